"""Search merge weights for a subject with a style, by drawing and measuring.

`plan` settles how a budget of pictures is spent and halves the candidates, `candidates` says which
weights are tried, `work` draws and measures, `retention` says what is kept, `summarise` compares
the winner with what everybody would have taken, and `findings` and `plot` write it down.
"""
