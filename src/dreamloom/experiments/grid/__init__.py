"""Draw an XY grid: pictures of the same prompts and seeds, changed in one or two ways at once.

`axes` reads what changes, `planning` says what each cell is drawn from, `running` draws the cells,
`retention` measures those of two adapters' weights, `sheet` lays them out, and `files` is the list
that is left, which is read without torch.
"""
