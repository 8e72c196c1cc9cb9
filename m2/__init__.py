"""Monarch Mixer: Monarch matrices, long convolutions and the mixers built on them (Fu et al. 2023, arXiv:2310.12109).

Empty until the Monarch family arrives: nothing here is a stub.
"""
