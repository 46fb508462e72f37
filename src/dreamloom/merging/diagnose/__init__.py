"""Diagnose two LoRAs before they are merged: similarity and conflicts, layer by layer."""
