"""Prompt packs: named lists of prompts, and what each may change of a subject."""
