"""Drawing pictures with a base model and adapters."""
