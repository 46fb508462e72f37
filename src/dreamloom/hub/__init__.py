"""The Hugging Face hub: a run's adapter, its model card and sample pictures, pushed there."""
