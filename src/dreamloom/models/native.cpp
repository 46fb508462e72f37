// Layers of a denoiser and of text encoders as single nodes of autograd, for a processor.
//
// The same operations in the same order as the Python beside this file, without what Python and
// torch's dispatch cost between them. All tensors are float32; rows are pictures times positions.
// native.py compiles this and tells which layer computes what.

#include <ATen/ATen.h>
#include <ATen/cpu/vec/vec.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <algorithm>
#include <numbers>
#include <optional>
#include <tuple>
#include <vector>

namespace dreamloom {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Optional = std::optional<Tensor>;

namespace {

Tensor flatten_rows(const Tensor& x) { return x.reshape({-1, x.size(-1)}); }

// x Wᵀ + b with a weight that lies in the order in which oneDNN reads it.
Tensor multiply_packed(const Tensor& rows, const Tensor& packed, const Optional& bias) {
  static auto multiply =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("mkldnn::_linear_pointwise", "")
          .typed<Tensor(const Tensor&, const Tensor&, const Optional&, c10::string_view,
                        c10::List<std::optional<at::Scalar>>, std::optional<c10::string_view>)>();
  return multiply.call(rows, packed, bias, "none", c10::List<std::optional<at::Scalar>>(), "");
}

}  // namespace

// Linear layers of one input as one map, each with its low-rank update; see LowRankMap in
// lowrank.py. Without factors it is a frozen layer.
struct Map : torch::CustomClassHolder {
  Tensor weight, turned;
  Optional bias, forth, back;
  Tensor down;
  std::vector<Tensor> ups;
  std::vector<int64_t> outputs, ranks;
  std::vector<double> scales;

  // `weight` is (outputs, inputs); `turned`, `forth` and `back` are its copies; see frozen.py.
  Map(Tensor weight, Optional bias, const Optional& turned, Optional forth, Optional back,
      const Optional& down, std::vector<Tensor> ups, std::vector<double> scales)
      : weight(std::move(weight)),
        bias(std::move(bias)),
        forth(std::move(forth)),
        back(std::move(back)),
        ups(std::move(ups)),
        scales(std::move(scales)) {
    this->turned = turned ? *turned : this->weight.t();
    if (down) this->down = *down;
    for (const auto& up : this->ups) {
      outputs.push_back(up.size(0));
      ranks.push_back(up.size(1));
    }
    if (this->ups.empty()) outputs.push_back(this->weight.size(0));
  }

  int64_t factors() const { return 2 * static_cast<int64_t>(ups.size()); }

  Tensor apply(const Tensor& rows, bool with_bias) const {
    if (forth) return multiply_packed(rows, *forth, with_bias ? bias : std::nullopt);
    return bias && with_bias ? at::addmm(*bias, rows, turned) : at::mm(rows, turned);
  }

  // The gradient of the input from those of the outputs, part by part.
  Tensor pull(const std::vector<Tensor>& gradients) const {
    if (back) {
      Tensor whole = gradients.size() == 1 ? gradients[0] : at::cat(gradients, 1);
      return multiply_packed(whole, *back, std::nullopt);
    }
    auto rows = weight.split_with_sizes(outputs, 0);
    Tensor result = at::mm(gradients[0], rows[0]);
    for (size_t i = 1; i < gradients.size(); ++i) result.addmm_(gradients[i], rows[i]);
    return result;
  }

  std::vector<Tensor> split(const Tensor& whole) const {
    if (outputs.size() == 1) return {whole};
    return whole.split_with_sizes(outputs, 1);
  }

  std::vector<Tensor> split_ranks(const Tensor& whole, int64_t dim = 1) const {
    if (ranks.size() == 1) return {whole};
    return whole.split_with_sizes(ranks, dim);
  }

  // All outputs side by side, and what the up factors were given.
  std::tuple<Tensor, Tensor> compute(const Tensor& rows, const Optional& known = std::nullopt,
                                     bool with_bias = true) const {
    Tensor whole = known ? known->clone() : apply(rows, with_bias);
    if (ups.empty()) return {whole, Tensor()};
    Tensor narrow = at::mm(rows, down.t());
    auto parts = split_ranks(narrow);
    auto outs = split(whole);
    for (size_t i = 0; i < ups.size(); ++i) {
      if (scales[i] != 1) parts[i].mul_(scales[i]);
      outs[i].addmm_(parts[i], ups[i].t());
    }
    return {whole, narrow};
  }

  // The gradients of the input, if wanted, and of the factors, downs before ups, from that of each
  // output.
  Tensor pull_back(const std::vector<Tensor>& gradients, const Tensor& rows, const Tensor& narrow,
                   bool wanted, variable_list& taught) const {
    if (ups.empty()) return wanted ? pull(gradients) : Tensor();
    Tensor inner = at::empty_like(narrow);
    auto parts = split_ranks(narrow);
    auto backs = split_ranks(inner);
    variable_list of_ups;
    for (size_t i = 0; i < ups.size(); ++i) {
      of_ups.push_back(at::mm(gradients[i].t(), parts[i]));
      at::mm_out(backs[i], gradients[i], ups[i]);
      if (scales[i] != 1) backs[i].mul_(scales[i]);
    }
    for (auto& one : split_ranks(at::mm(inner.t(), rows), 0)) taught.push_back(one);
    for (auto& one : of_ups) taught.push_back(one);
    if (!wanted) return Tensor();
    return pull(gradients).addmm_(inner, down);
  }
};

using MapPointer = c10::intrusive_ptr<Map>;

// What a node of autograd kept for its backward pass, read in the order in which it was written.
struct Kept {
  variable_list all;
  size_t next = 0;

  const Tensor& take() { return all[next++]; }
};

// ------------------------------------------------------------------ attention

// What an attention keeps for its backward pass.
struct AttentionKept {
  Tensor narrow_query, narrow, q, k, v, mixed, spread, narrow_out;

  void write(variable_list& kept) const {
    for (const auto& one : {narrow_query, narrow, q, k, v, mixed, spread, narrow_out})
      kept.push_back(one);
  }

  static AttentionKept read(Kept& kept) {
    AttentionKept one;
    for (auto* part : {&one.narrow_query, &one.narrow, &one.q, &one.k, &one.v, &one.mixed,
                       &one.spread, &one.narrow_out})
      *part = kept.take();
    return one;
  }
};

// `query` is null where all three projections read one input and `joint` holds them.
struct Attention {
  MapPointer query, joint, out;
  int64_t heads = 1;
  bool is_causal = false;

  int64_t factors() const {
    return (query ? query->factors() : 0) + joint->factors() + out->factors();
  }

  Tensor compute(const Tensor& rows, const Tensor& told, const Optional& known, int64_t pictures,
                 AttentionKept& kept) const {
    Tensor whole;
    std::tie(whole, kept.narrow) = joint->compute(told, known);
    auto parts = joint->split(whole);
    if (query) {
      Tensor asked;
      std::tie(asked, kept.narrow_query) = query->compute(rows);
      parts.insert(parts.begin(), asked);
    }
    for (auto& one : parts) one = part_heads(one, pictures);
    kept.q = parts[0], kept.k = parts[1], kept.v = parts[2];
    std::tie(kept.mixed, kept.spread) = at::_scaled_dot_product_flash_attention_for_cpu(
        kept.q, kept.k, kept.v, 0.0, is_causal);
    Tensor result;
    std::tie(result, kept.narrow_out) = out->compute(join_heads(kept.mixed));
    return result;
  }

  // The gradients of both inputs, and of the factors: the query's, the joint map's, the output's.
  std::tuple<Tensor, Tensor> pull_back(const Tensor& gradient, const Tensor& rows,
                                       const Tensor& told, const AttentionKept& kept,
                                       bool wants_rows, bool wants_told,
                                       variable_list& taught) const {
    variable_list of_out, of_joint;
    Tensor into = out->pull_back({gradient}, join_heads(kept.mixed), kept.narrow_out, true, of_out);
    auto [of_q, of_k, of_v] = at::_scaled_dot_product_flash_attention_for_cpu_backward(
        part_heads(into, kept.q.size(0)), kept.q, kept.k, kept.v, kept.mixed, kept.spread, 0.0,
        is_causal);
    Tensor to_rows, to_told;
    if (query) {
      to_rows =
          query->pull_back({join_heads(of_q)}, rows, kept.narrow_query, wants_rows, taught);
      to_told = joint->pull_back({join_heads(of_k), join_heads(of_v)}, told, kept.narrow,
                                 wants_told, of_joint);
    } else {
      to_rows = joint->pull_back({join_heads(of_q), join_heads(of_k), join_heads(of_v)}, rows,
                                 kept.narrow, wants_rows, of_joint);
    }
    taught.insert(taught.end(), of_joint.begin(), of_joint.end());
    taught.insert(taught.end(), of_out.begin(), of_out.end());
    return {to_rows, to_told};
  }

  Tensor part_heads(const Tensor& rows, int64_t pictures) const {
    return rows.view({pictures, -1, heads, rows.size(1) / heads}).transpose(1, 2);
  }

  static Tensor join_heads(const Tensor& parts) {
    return parts.transpose(1, 2).reshape({parts.size(0) * parts.size(2), -1});
  }
};

// ------------------------------------------------------------------ what lies between

struct Norm {
  Tensor weight, bias;
  double epsilon = 1e-5;

  std::tuple<Tensor, Tensor, Tensor> compute(const Tensor& x) const {
    return at::native_layer_norm(x, {x.size(1)}, weight, bias, epsilon);
  }

  // The gradient of a frozen norm's input.
  Tensor pull_back(const Tensor& gradient, const Tensor& x, const Tensor& mean,
                   const Tensor& deviation) const {
    return std::get<0>(at::native_layer_norm_backward(gradient, x, {x.size(1)}, mean, deviation,
                                                      weight, bias, {true, false, false}));
  }
};

using Vector = at::vec::Vectorized<float>;

constexpr float kHalfRoot = std::numbers::sqrt2_v<float> / 2;

// The normal distribution's cumulative function: gelu(x) = x Φ(x) (arXiv:1606.08415).
Vector spread_normally(const Vector& x) {
  return Vector(0.5f) * (Vector(1.0f) + (x * Vector(kHalfRoot)).erf());
}

// Calls `work` with the first column and the number of columns of each vector of a row.
template <typename Work>
void walk(int64_t width, const Work& work) {
  for (int64_t column = 0; column < width; column += Vector::size())
    work(column, std::min<int64_t>(Vector::size(), width - column));
}

// h ⊙ gelu(g), where h and g are the halves of `both`, to which a bias is added where they lie; and
// Φ(g), which the way back reads again.
std::tuple<Tensor, Tensor> gate(const Tensor& both, const Optional& bias) {
  const int64_t rows = both.size(0), width = both.size(1) / 2;
  Tensor out = at::empty({rows, width}, both.options()), spread = at::empty_like(out);
  const Tensor added = bias ? bias->contiguous() : Tensor();
  const float* of_all = bias ? added.const_data_ptr<float>() : nullptr;
  auto add = [&](float* to, int64_t column, int64_t count) {
    Vector sum = Vector::loadu(to, count);
    if (!of_all) return sum;
    sum = sum + Vector::loadu(of_all + column, count);
    sum.store(to, count);
    return sum;
  };
  for (int64_t row = 0; row < rows; ++row) {
    float* whole = both.data_ptr<float>() + row * 2 * width;
    float* result = out.data_ptr<float>() + row * width;
    float* kept = spread.data_ptr<float>() + row * width;
    walk(width, [&](int64_t at, int64_t count) {
      Vector hidden = add(whole + at, at, count);
      Vector gates = add(whole + width + at, width + at, count);
      Vector normal = spread_normally(gates);
      normal.store(kept + at, count);
      (hidden * gates * normal).store(result + at, count);
    });
  }
  return {out, spread};
}

// The gradient of `both` from that of h ⊙ gelu(g); the derivative of gelu is Φ(g) + g φ(g).
Tensor gate_back(const Tensor& gradient, const Tensor& both, const Tensor& spread) {
  const int64_t rows = both.size(0), width = both.size(1) / 2;
  Tensor into = at::empty_like(both);
  const Tensor given = gradient.contiguous();
  const Vector height(kHalfRoot * std::numbers::inv_sqrtpi_v<float>);
  for (int64_t row = 0; row < rows; ++row) {
    const float* h = both.const_data_ptr<float>() + row * 2 * width;
    const float* back = given.const_data_ptr<float>() + row * width;
    const float* kept = spread.const_data_ptr<float>() + row * width;
    float* of_h = into.data_ptr<float>() + row * 2 * width;
    walk(width, [&](int64_t at, int64_t count) {
      Vector hidden = Vector::loadu(h + at, count), gates = Vector::loadu(h + width + at, count);
      Vector outer = Vector::loadu(back + at, count);
      Vector normal = Vector::loadu(kept + at, count);
      Vector density = height * (gates * gates * Vector(-0.5f)).exp();
      (outer * gates * normal).store(of_h + at, count);
      (outer * hidden * (normal + gates * density)).store(of_h + width + at, count);
    });
  }
  return into;
}

enum class Curve { gated, gelu, quick };

constexpr double kQuick = 1.702;

// Two maps with a curve between them: y = W₂ σ(W₁ x), where σ is
// - gated: h ⊙ gelu(g), h and g the halves of what it is given (Shazeer, arXiv:2002.05202, GEGLU);
// - gelu;
// - quick: CLIP's x · sigmoid(1.702 x).
struct FeedForward {
  MapPointer widen, narrow;
  Curve curve = Curve::gelu;

  int64_t factors() const { return widen->factors() + narrow->factors(); }

  Tensor compute(const Tensor& rows, variable_list& kept) const {
    // The gates add the bias where they read.
    auto [wide, narrow_in] = widen->compute(rows, std::nullopt, curve != Curve::gated);
    auto [inner, share] = bend(wide);
    auto [result, narrow_out] = narrow->compute(inner);
    // The narrow map's input is needed only where that map learns.
    for (const auto& one :
         {wide, share, narrow->ups.empty() ? Tensor() : inner, narrow_in, narrow_out})
      kept.push_back(one);
    return result;
  }

  Tensor pull_back(const Tensor& gradient, const Tensor& rows, Kept& kept,
                   variable_list& taught) const {
    const Tensor &wide = kept.take(), &share = kept.take(), &inner = kept.take(),
                 &narrow_in = kept.take(), &narrow_out = kept.take();
    variable_list of_narrow;
    Tensor into = narrow->pull_back({gradient}, inner, narrow_out, true, of_narrow);
    Tensor result =
        widen->pull_back({unbend(into, wide, share)}, rows, narrow_in, true, taught);
    taught.insert(taught.end(), of_narrow.begin(), of_narrow.end());
    return result;
  }

 private:
  // σ of the wide map's output, and the share of it that passes where the way back reads that again.
  std::tuple<Tensor, Tensor> bend(const Tensor& wide) const {
    if (curve == Curve::gated) return gate(wide, widen->bias);
    if (curve == Curve::gelu) return {at::gelu(wide), Tensor()};
    Tensor share = at::mul(wide, kQuick).sigmoid_();
    return {at::mul(wide, share), share};
  }

  Tensor unbend(const Tensor& gradient, const Tensor& wide, const Tensor& share) const {
    if (curve == Curve::gated) return gate_back(gradient, wide, share);
    if (curve == Curve::gelu) return at::gelu_backward(gradient, wide);
    // s + 1.702 x s (1 - s)
    Tensor slope = at::rsub(share, 1).mul_(wide).mul_(kQuick).add_(1).mul_(share);
    return slope.mul_(gradient);
  }
};

// ------------------------------------------------------------------ what both nodes do

// Keeps what the backward pass needs of a layer that was given `x`.
template <typename Layer>
void keep(AutogradContext* ctx, const c10::intrusive_ptr<Layer>& layer, const Tensor& x,
          variable_list kept) {
  ctx->save_for_backward(std::move(kept));
  ctx->saved_data["layer"] = layer;
  ctx->saved_data["shape"] = x.sizes().vec();
  ctx->saved_data["wants_x"] = x.requires_grad();
}

// The gradient of what a layer was given, if it is wanted: past the first norm, and past that norm.
Tensor join_gradients(AutogradContext* ctx, const Norm& norm, const Tensor& past_norm,
                      const Tensor& through_norm, const Tensor& rows, const Tensor& mean,
                      const Tensor& deviation) {
  if (!ctx->saved_data["wants_x"].toBool()) return Tensor();
  Tensor whole = norm.pull_back(through_norm, rows, mean, deviation).add_(past_norm);
  return whole.view(ctx->saved_data["shape"].toIntVector());
}

// ------------------------------------------------------------------ a transformer's block

// diffusers' BasicTransformerBlock as SDXL has it: attention to itself, attention to the prompt
// and a gated feed-forward layer, each after a norm and added to what it was given.
struct Block : torch::CustomClassHolder {
  Attention self, cross;
  FeedForward feed_forward;
  std::vector<Norm> norms;

  Block(std::vector<MapPointer> maps, std::vector<Tensor> norm_tensors,
        std::vector<double> epsilons, int64_t self_heads, int64_t cross_heads) {
    TORCH_CHECK(maps.size() == 7 && norm_tensors.size() == 6 && epsilons.size() == 3);
    self = {MapPointer(), maps[0], maps[1], self_heads, false};
    cross = {maps[2], maps[3], maps[4], cross_heads, false};
    feed_forward = {maps[5], maps[6], Curve::gated};
    for (size_t i = 0; i < 3; ++i)
      norms.push_back({norm_tensors[2 * i], norm_tensors[2 * i + 1], epsilons[i]});
  }

  int64_t factors() const { return self.factors() + cross.factors() + feed_forward.factors(); }
};

using BlockPointer = c10::intrusive_ptr<Block>;

struct BlockNode : torch::autograd::Function<BlockNode> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& prompt,
                        const Optional& known, const BlockPointer& block,
                        at::TensorList factors) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const int64_t pictures = x.size(0);
    Tensor rows = flatten_rows(x), told = flatten_rows(prompt);
    variable_list kept{rows, told};
    AttentionKept of_self, of_cross;

    auto [y1, mean1, deviation1] = block->norms[0].compute(rows);
    Tensor h1 = block->self.compute(y1, y1, std::nullopt, pictures, of_self).add_(rows);
    auto [y2, mean2, deviation2] = block->norms[1].compute(h1);
    Tensor h2 = block->cross.compute(y2, told, known, pictures, of_cross).add_(h1);
    auto [y3, mean3, deviation3] = block->norms[2].compute(h2);
    variable_list of_forward;
    Tensor h3 = block->feed_forward.compute(y3, of_forward).add_(h2);

    for (const auto& one : {y1, mean1, deviation1, h1, y2, mean2, deviation2, h2, mean3,
                            deviation3, block->feed_forward.widen->ups.empty() ? Tensor() : y3})
      kept.push_back(one);
    of_self.write(kept);
    of_cross.write(kept);
    kept.insert(kept.end(), of_forward.begin(), of_forward.end());
    keep(ctx, block, x, std::move(kept));
    ctx->saved_data["told_shape"] = prompt.sizes().vec();
    ctx->saved_data["wants_prompt"] = prompt.requires_grad();
    return h3.view(x.sizes());
  }

  static variable_list backward(AutogradContext* ctx, variable_list gradients) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto block = ctx->saved_data["layer"].toCustomClass<Block>();
    Kept kept{ctx->get_saved_variables()};
    const Tensor &rows = kept.take(), &told = kept.take();
    const Tensor &y1 = kept.take(), &mean1 = kept.take(), &deviation1 = kept.take();
    const Tensor &h1 = kept.take();
    const Tensor &y2 = kept.take(), &mean2 = kept.take(), &deviation2 = kept.take();
    const Tensor &h2 = kept.take();
    const Tensor &mean3 = kept.take(), &deviation3 = kept.take(), &y3 = kept.take();
    auto of_self = AttentionKept::read(kept);
    auto of_cross = AttentionKept::read(kept);
    variable_list taught_self, taught_cross, taught_forward;

    Tensor gradient = flatten_rows(gradients[0]);
    Tensor back = block->feed_forward.pull_back(gradient, y3, kept, taught_forward);
    Tensor of_h2 = block->norms[2].pull_back(back, h2, mean3, deviation3).add_(gradient);
    auto [of_y2, of_told] =
        block->cross.pull_back(of_h2, y2, told, of_cross, true,
                               ctx->saved_data["wants_prompt"].toBool(), taught_cross);
    Tensor of_h1 = block->norms[1].pull_back(of_y2, h1, mean2, deviation2).add_(of_h2);
    Tensor of_y1 = std::get<0>(block->self.pull_back(
        of_h1, y1, y1, of_self, ctx->saved_data["wants_x"].toBool(), false, taught_self));
    Tensor of_x = join_gradients(ctx, block->norms[0], of_h1, of_y1, rows, mean1, deviation1);
    if (of_told.defined()) of_told = of_told.view(ctx->saved_data["told_shape"].toIntVector());
    variable_list result{of_x, of_told, Tensor(), Tensor()};
    for (const auto* part : {&taught_self, &taught_cross, &taught_forward})
      result.insert(result.end(), part->begin(), part->end());
    return result;
  }
};

// ------------------------------------------------------------------ a text encoder's layer

// transformers' CLIPEncoderLayer: attention to what came before and a feed-forward layer, each after
// a norm and added to what it was given.
struct TextLayer : torch::CustomClassHolder {
  Attention self;
  FeedForward feed_forward;
  std::vector<Norm> norms;

  TextLayer(std::vector<MapPointer> maps, std::vector<Tensor> norm_tensors,
            std::vector<double> epsilons, int64_t heads, bool is_causal, bool is_quick) {
    TORCH_CHECK(maps.size() == 4 && norm_tensors.size() == 4 && epsilons.size() == 2);
    self = {MapPointer(), maps[0], maps[1], heads, is_causal};
    feed_forward = {maps[2], maps[3], is_quick ? Curve::quick : Curve::gelu};
    for (size_t i = 0; i < 2; ++i)
      norms.push_back({norm_tensors[2 * i], norm_tensors[2 * i + 1], epsilons[i]});
  }

  int64_t factors() const { return self.factors() + feed_forward.factors(); }
};

using TextPointer = c10::intrusive_ptr<TextLayer>;

struct TextNode : torch::autograd::Function<TextNode> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const TextPointer& layer,
                        at::TensorList factors) {
    at::AutoDispatchBelowADInplaceOrView guard;
    Tensor rows = flatten_rows(x);
    AttentionKept of_self;
    auto [y1, mean1, deviation1] = layer->norms[0].compute(rows);
    Tensor h1 = layer->self.compute(y1, y1, std::nullopt, x.size(0), of_self).add_(rows);
    auto [y2, mean2, deviation2] = layer->norms[1].compute(h1);
    variable_list of_forward;
    Tensor h2 = layer->feed_forward.compute(y2, of_forward).add_(h1);

    variable_list kept{rows, y1, mean1, deviation1, h1, mean2, deviation2, y2};
    of_self.write(kept);
    kept.insert(kept.end(), of_forward.begin(), of_forward.end());
    keep(ctx, layer, x, std::move(kept));
    return h2.view(x.sizes());
  }

  static variable_list backward(AutogradContext* ctx, variable_list gradients) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto layer = ctx->saved_data["layer"].toCustomClass<TextLayer>();
    Kept kept{ctx->get_saved_variables()};
    const Tensor& rows = kept.take();
    const Tensor &y1 = kept.take(), &mean1 = kept.take(), &deviation1 = kept.take();
    const Tensor& h1 = kept.take();
    const Tensor &mean2 = kept.take(), &deviation2 = kept.take(), &y2 = kept.take();
    auto of_self = AttentionKept::read(kept);
    variable_list taught, of_forward;

    Tensor gradient = flatten_rows(gradients[0]);
    Tensor back = layer->feed_forward.pull_back(gradient, y2, kept, of_forward);
    Tensor of_h1 = layer->norms[1].pull_back(back, h1, mean2, deviation2).add_(gradient);
    Tensor of_y1 = std::get<0>(layer->self.pull_back(
        of_h1, y1, y1, of_self, ctx->saved_data["wants_x"].toBool(), false, taught));
    Tensor of_x = join_gradients(ctx, layer->norms[0], of_h1, of_y1, rows, mean1, deviation1);
    variable_list result{of_x, Tensor()};
    result.insert(result.end(), taught.begin(), taught.end());
    result.insert(result.end(), of_forward.begin(), of_forward.end());
    return result;
  }
};

// ------------------------------------------------------------------ a frozen convolution

// A convolution of 3x3 that keeps the pictures' size; see convolutions.py for its two weights.
struct Convolution : torch::CustomClassHolder {
  Tensor forth, back;
  Optional bias;

  Convolution(Tensor forth, Tensor back, Optional bias)
      : forth(std::move(forth)), back(std::move(back)), bias(std::move(bias)) {}

  static Tensor apply(const Tensor& x, const Tensor& packed, const Optional& bias) {
    static auto convolve =
        c10::Dispatcher::singleton()
            .findSchemaOrThrow("mkldnn::_convolution_pointwise", "")
            .typed<Tensor(const Tensor&, const Tensor&, const Optional&, at::IntArrayRef,
                          at::IntArrayRef, at::IntArrayRef, int64_t, c10::string_view,
                          c10::List<std::optional<at::Scalar>>,
                          std::optional<c10::string_view>)>();
    static constexpr int64_t ones[] = {1, 1};
    return convolve.call(x.contiguous(), packed, bias, ones, ones, ones, 1, "none",
                         c10::List<std::optional<at::Scalar>>(), "");
  }
};

using ConvolutionPointer = c10::intrusive_ptr<Convolution>;

struct ConvolutionNode : torch::autograd::Function<ConvolutionNode> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const ConvolutionPointer& layer) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->saved_data["layer"] = layer;
    return Convolution::apply(x, layer->forth, layer->bias);
  }

  static variable_list backward(AutogradContext* ctx, variable_list gradients) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto layer = ctx->saved_data["layer"].toCustomClass<Convolution>();
    return {Convolution::apply(gradients[0], layer->back, std::nullopt), Tensor()};
  }
};

}  // namespace dreamloom

TORCH_LIBRARY(dreamloom_native, library) {
  using namespace dreamloom;
  library.class_<Map>("Map").def(
      torch::init<Tensor, Optional, const Optional&, Optional, Optional, const Optional&,
                  std::vector<Tensor>, std::vector<double>>());
  library.class_<Block>("Block")
      .def(torch::init<std::vector<MapPointer>, std::vector<Tensor>, std::vector<double>, int64_t,
                       int64_t>())
      .def("run", [](const BlockPointer& self, const Tensor& x, const Tensor& prompt,
                     const Optional& known, const std::vector<Tensor>& factors) {
        TORCH_CHECK(static_cast<int64_t>(factors.size()) == self->factors());
        return BlockNode::apply(x, prompt, known, self, at::TensorList(factors));
      });
  library.class_<Convolution>("Convolution")
      .def(torch::init<Tensor, Tensor, Optional>())
      .def("run", [](const ConvolutionPointer& self, const Tensor& x) {
        return ConvolutionNode::apply(x, self);
      });
  library.class_<TextLayer>("TextLayer")
      .def(torch::init<std::vector<MapPointer>, std::vector<Tensor>, std::vector<double>, int64_t,
                       bool, bool>())
      .def("run", [](const TextPointer& self, const Tensor& x,
                     const std::vector<Tensor>& factors) {
        TORCH_CHECK(static_cast<int64_t>(factors.size()) == self->factors());
        return TextNode::apply(x, self, at::TensorList(factors));
      });
}
