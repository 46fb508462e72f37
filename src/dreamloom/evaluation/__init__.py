"""The evaluate stage: pictures and photos in, scores with n, interval, floor and ceiling out."""
