"""Many runs side by side: the demo, studies, the search for merge weights, the seed audit."""
