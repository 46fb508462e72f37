"""Pictures and prompts to vectors: the pinned encoders, and how they are fed.

A score depends on its encoder, the encoder's revision and the preprocessing; an encoder's ``key``
names all three, and only scores of one key may be compared. Encoders see PIL pictures in 8-bit
RGB and nothing else, so that no picture can arrive at a wrong scale. Evaluations download nothing:
an encoder whose weights are not on this machine is `Missing`, with the reason, and no other takes
its place.
"""
