"""The photos stage: a folder of photos in, upright copies and what is not ideal about them out.

Beside a photo may lie its caption (IMG_1.txt) and its mask (IMG_1.mask.png, white where the
subject is); metadata.jsonl may say the same of all, and the subject's box. `listing` reads the
folder, `check` judges the photos, `prepare` writes the copies.
"""
