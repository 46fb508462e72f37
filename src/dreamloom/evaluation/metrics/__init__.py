"""What the scores are: similarity of features, the scorecard, and the evaluator that fills it."""
