"""Search: find weights for a merge of a subject with a style, by drawing and measuring.

`plan` settles how a budget of pictures is spent, `candidates` which weights are tried, `work` draws
and looks, `shares` says what is kept, `rounds` halves the candidates, `heldout` compares the winner
with what everybody would have taken, and `findings` and `picture` tell it.
"""

from dreamloom.search.findings import Findings
from dreamloom.search.running import run_search
from dreamloom.search.wish import Wish

__all__ = ["Findings", "Wish", "run_search"]
