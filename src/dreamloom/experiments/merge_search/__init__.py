"""Search: find weights for a merge of a subject with a style, by drawing and measuring.

`plan` settles how a budget of pictures is spent, `candidates` which weights are tried, `work` draws
and looks, `shares` says what is kept, `rounds` halves the candidates, `heldout` compares the winner
with what everybody would have taken, and `findings` and `picture` tell it.
"""
