"""From a pattern to a stack of blocks that runs; nothing here embeds or predicts, and only `mixers` names a mixer."""
