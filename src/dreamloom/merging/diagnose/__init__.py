"""What two adapters have to do with each other, layer by layer, before they are merged."""
