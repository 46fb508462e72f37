"""What training and drawing are fed: photos, class images, prompts, buckets and image files."""
