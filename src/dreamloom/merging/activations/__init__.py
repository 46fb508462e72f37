"""What a merge must know from the base model: how its layers are filled, which masks fit."""
