"""What the scores are: similarity of features, the scorecard, and the bench that fills it."""
