"""What every package stands on: errors, events, settings, run folders, manifests, devices."""
