"""Examples of every command, with which its ``--help`` ends."""

from __future__ import annotations

import click

EXAMPLES: dict[str, tuple[str, ...]] = {
    "": (
        "dreamloom demo",
        'dreamloom train my-photos --subject "rraj person" --base sdxl --out runs/me',
    ),
    "demo": ("dreamloom demo --preset quick --out runs/quick",),
    "photos": ("dreamloom photos my-photos", "dreamloom photos my-photos --faces --base sdxl"),
    "train": (
        'dreamloom train my-photos --subject "rraj person" --base sdxl --out runs/me',
        'dreamloom train my-dog --subject "rraj dog" --preset quick --set train.rank=16',
    ),
    "ask": (
        "dreamloom ask runs/me sample",
        'dreamloom ask runs/me prompts --prompt "a painting of {subject}"',
    ),
    "plan": ("dreamloom plan --base sdxl --gpu-memory 12GiB",),
    "generate": (
        "dreamloom generate --adapter runs/me/adapter.safetensors --pack person-v1 \\\n"
        "    --floor --out runs/me",
        'dreamloom generate --base sdxl --prompt "a castle" --seeds 2 --out runs/look',
    ),
    "grid": (
        "dreamloom grid --adapter me.safetensors --adapter style.safetensors \\\n"
        '    --prompt "pixel, a photo of {subject}" --out runs/me --name mix \\\n'
        "    --x weight:1=0,0.25,0.5,0.75,1 --y weight:2=0,0.25,0.5,0.75,1",
        'dreamloom grid --prompt "a painting of {subject}" --out runs/me \\\n'
        "    --x checkpoint=100,200,final --y guidance=3,5,7.5",
    ),
    "packs": ("dreamloom packs", "dreamloom packs person-v1"),
    "evaluate": (
        "dreamloom evaluate runs/me/images/pictures --photos my-photos \\\n"
        "    --floor runs/me/images/pictures_base",
    ),
    "compare": (
        "dreamloom compare runs/me:pictures runs/other:pictures",
        "dreamloom compare before.json after.json --score identity",
    ),
    "retention": (
        "dreamloom retention runs/mix/images/merged --base runs/mix/images/base \\\n"
        "    --subject runs/mix/images/subject --style runs/mix/images/style \\\n"
        "    --photos my-photos",
    ),
    "report": ("dreamloom report runs/me",),
    "study": (
        "dreamloom study recipes/questions/prior.toml --quick --photos my-photos \\\n"
        '    --subject "rraj person"',
    ),
    "studio": (
        "dreamloom studio",
        "dreamloom studio --root /data/runs --port 9000",
    ),
    "settings": ("dreamloom settings",),
    "models": ("dreamloom models list", "dreamloom models fetch clip dino"),
    "models list": ("dreamloom models list",),
    "models fetch": (
        "dreamloom models fetch clip dino dinov2",
        "dreamloom models fetch lpips --from lpips.safetensors",
    ),
    "models path": ("dreamloom models path picturebook",),
    "merge": (
        "dreamloom merge me.safetensors style.safetensors:0.8 -o both.safetensors",
        "dreamloom merge me.safetensors style.safetensors -o both.safetensors \\\n"
        "    --method ties --set density=0.2 --rank 32",
    ),
    "remix": ("dreamloom remix both.safetensors style=0.6",),
    "inspect": ("dreamloom inspect both.safetensors",),
    "diagnose": ("dreamloom diagnose me.safetensors style.safetensors --picture two.png",),
    "resize": ("dreamloom resize both.safetensors --rank 16 -o small.safetensors",),
    "convert": ("dreamloom convert me.safetensors --format peft -o me-peft.safetensors",),
    "extract": ("dreamloom extract tuned.safetensors --base sdxl --rank 32 -o it.safetensors",),
    "bake": ("dreamloom bake me.safetensors:0.8 --base sdxl -o me-in-sdxl",),
    "search": (
        "dreamloom search me.safetensors style.safetensors --photos my-photos \\\n"
        "    --budget 100 --out runs/search",
    ),
    "push": (
        "dreamloom push runs/me my-adapter --out look-first",
        "dreamloom push runs/me my-adapter",
    ),
    "token": ('dreamloom token "rraj person" --base sdxl',),
    "doctor": ("dreamloom doctor", "dreamloom doctor --device cuda:1"),
    "completion": (
        "dreamloom completion bash >> ~/.bashrc",
        "dreamloom completion zsh >> ~/.zshrc",
        "dreamloom completion fish > ~/.config/fish/completions/dreamloom.fish",
    ),
}
"""Lines to paste, by the command's name behind ``dreamloom``."""


class WithExamples(click.Command):
    """A command whose help ends with examples of its own."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples as they are, for lines to paste must not be broken."""
        super().format_epilog(ctx, formatter)
        lines = EXAMPLES.get(name_command(ctx), ())
        if lines:
            with formatter.section("Example" if len(lines) == 1 else "Examples"):
                indent = " " * formatter.current_indent
                for line in "\n".join(lines).splitlines():
                    formatter.write(f"{indent}{line}\n")


def name_command(ctx: click.Context) -> str:
    """Name a command as it is typed behind the program's name."""
    names: list[str] = []
    while ctx.parent is not None:
        names.insert(0, ctx.info_name or "")
        ctx = ctx.parent
    return " ".join(names)
