"""Ways to make one adapter out of several; `methods` lists them, `combine` carries one out."""
