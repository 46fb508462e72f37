"""Merge LoRAs: `methods` lists the merge methods, `combine` carries one out."""
