"""A stack of blocks whose mixers follow a pattern: the body of every model."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from m2.linear import PRODUCT
from ssm.absent import blank
from ssm.sequence_cut import cut_of
from zoo.layers.mesh_axes import placed_rows
from zoo.layers.needs import has
from zoo.layers.rngs import Seed, as_rngs, require_rngs
from zoo.stack.backbone_config import BackboneConfig, word_config
from zoo.stack.block import Block, make_norm, make_shared, shared_name
from zoo.stack.gaps import close_gaps
from zoo.stack.gathering import gathered, gathering
from zoo.stack.pattern import Folded, fold, parse_pattern
from zoo.stack.pieces import run_in_pieces, takes_pieces
from zoo.stack.scan_layers import looped_blocks, run_blocks

# Linear maps multiply rows with one matrix; products with a batch of them are a mixer's insides, as attention's scores,
# unless the layer gives them a name: block-diagonal maps, those of experts, and long convolutions.
_MATMULS = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable, jax.checkpoint_policies.save_only_these_names(PRODUCT)
)
_POLICIES = {"nothing": None, "matmuls": _MATMULS}


class Backbone(nnx.Module):
    """Blocks and a final normalisation, without an embedding: text, image patches and features all enter."""

    def __init__(self, config: BackboneConfig, *, rngs: Seed):
        self.config, rngs = config, as_rngs(rngs)
        self.words = parse_pattern(config.pattern, config.n_layers)
        # Which layer is at each depth: one of its own, or for words that share one that of the first of them.
        built: dict[Any, int] = {}
        self.order = tuple(built.setdefault(w if w.shared else depth, len(built)) for depth, w in enumerate(self.words))
        words = [self.words[self.order.index(i)] for i in range(len(built))]
        self.layers = nnx.List([Block(config, word, first=i == 0, rngs=rngs) for i, word in enumerate(words)])
        # What several depths read, once: the parameters of a module are in one place of the tree.
        first: dict[str, str] = {}
        for mixer in (mixer for word in words for mixer in (*word.mixers, word.channel) if mixer):
            if (name := shared_name(config, mixer)) is not None:
                first.setdefault(name, mixer)
        self.shared_names = tuple(first)
        self.shared = nnx.List([make_shared(config, mixer, rngs=rngs) for mixer in first.values()])
        self.norm_f = make_norm(config, rngs) if config.norm_place == "pre" else None

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The block at each depth. `layers` has each block once, where the pattern lets several depths share it."""
        return tuple(self.layers[i] for i in self.order)

    def __call__(
        self,
        x: Float[Array, "b l d"],
        *,
        mask: Bool[Array, "b l"] | None = None,
        segment_ids: Int[Array, "b l"] | None = None,
        rngs: nnx.Rngs | None = None,
        grid: tuple[int, int] | None = None,
    ) -> Float[Array, "b l d"]:
        """Runs the stack over whole sequences.

        Args:
          x: input.
          mask: False where a position is not there, whatever lies there and wherever it is. Its output has no meaning.
          segment_ids: documents packed in a row, each a run of equal ids; they never see each other.
          rngs: stream "dropout" switches dropout on; None leaves it off.
          grid: rows and columns of an image whose places the positions are, for mixers that go by them.

        Raises:
          ValueError: a mixer of images without a grid.
        """
        return self.run(x, mask=mask, segment_ids=segment_ids, rngs=rngs, grid=grid)[0]

    def run(
        self,
        x: Float[Array, "b l d"],
        *,
        mask: Bool[Array, "b l"] | None = None,
        segment_ids: Int[Array, "b l"] | None = None,
        rngs: nnx.Rngs | None = None,
        grid: tuple[int, int] | None = None,
    ) -> tuple[Float[Array, "b l d"], Float[Array, ""]]:
        """As `__call__`, and what training adds to its loss: the sum of the mixers' auxiliary losses."""
        if 0 in x.shape:
            x = self._enter(x)
            return self._normed(x), jnp.zeros((), jnp.promote_types(x.dtype, jnp.float32))
        run, carry, noise, leave = self._begin(x, mask, segment_ids, rngs, grid)
        blocks = [nnx.split(block) for block in self.blocks]
        done, items = self._items
        if done:
            carry = run(*blocks[0], carry, _of_block(noise, 0))
        rest = jax.tree.map(lambda a: a[done:], noise)
        x, loss = run_blocks(run, items, blocks[done:], rest, carry)
        return leave(self._normed(x)), loss

    def hidden_states(
        self,
        x: Float[Array, "b l d"],
        *,
        mask: Bool[Array, "b l"] | None = None,
        segment_ids: Int[Array, "b l"] | None = None,
        rngs: nnx.Rngs | None = None,
        grid: tuple[int, int] | None = None,
    ) -> tuple[Float[Array, "b l d"], ...]:
        """The residual stream before the first block and behind each: n_layers + 1 arrays.

        The convention of transformers' output_hidden_states for BERT, Llama and hybrids: the first is the input, and
        the last is what `__call__` gives, behind the final normalisation where there is one; those between are not
        normalised. (There Mamba leaves out the first, and ViT the last normalisation.) Blocks run one by one, also with
        scan_layers.
        """
        if 0 in x.shape:
            x = self._enter(x)
            return (*[x] * len(self.blocks), self._normed(x))
        run, carry, noise, leave = self._begin(x, mask, segment_ids, rngs, grid)
        states = [carry[0]]
        for i, block in enumerate(self.blocks):
            carry = run(*nnx.split(block), carry, _of_block(noise, i))
            states.append(carry[0])
        return (self._enter(x), *map(leave, (*states[1:-1], self._normed(states[-1]))))

    def _begin(self, x, mask, segment_ids, rngs, grid):
        """What runs one block, what enters the first (the stream, no losses yet), the noise of all, the way out."""
        self._check_cut(x)
        x, noise = self._enter(x), self._noise(rngs)
        x, mask, segment_ids, leave = _close(x, mask, segment_ids)
        x = placed_rows(x)
        given = {"mask": mask, "segment_ids": segment_ids, "grid": grid, "embeddings": x, "shared": self._shared}

        def run(graphdef, params, carry, noise):
            (x, total), (key, skip) = carry, noise or (None, None)
            block = nnx.merge(graphdef, gathered(params))
            x, loss = block.run(x, key=key, skip=skip, **given)
            return placed_rows(x), total + loss.astype(total.dtype)

        whole = self._rounding(run, x.dtype) if self.config.remat_rounds else self._recomputed(run)
        size = self.config.remat_positions
        if size is None or noise is not None:
            return whole, (x, jnp.zeros((), jnp.promote_types(x.dtype, jnp.float32))), noise, leave

        def run_piecewise(graphdef, params, carry, noise):
            block, (x, total) = nnx.merge(graphdef, gathered(params)), carry
            if not takes_pieces(block, x, size):
                return whole(graphdef, params, carry, noise)
            return run_in_pieces(block, x, size, mask=mask, segment_ids=segment_ids), total

        return run_piecewise, (x, jnp.zeros((), jnp.promote_types(x.dtype, jnp.float32))), noise, leave

    def _check_cut(self, x):
        """Raises a NotImplementedError that names a mixer which may not be called with rows cut over devices."""
        if cut_of(x) is None:
            return
        for word, block in zip(self.words, self.blocks, strict=True):
            for name, mixer in (("+".join(word.mixers), block.mixer), (word.channel, block.mlp)):
                if mixer is not None and not has(mixer, "runs_cut"):
                    raise NotImplementedError(
                        f"{name} on a mesh that cuts rows over devices, which the mixer does not say that it can run "
                        "on (runs_cut = True), expected --mesh.sequence 1"
                    )

    @property
    def _items(self) -> tuple[int, Folded]:
        """How many blocks run by themselves first, and the words of the others, folded where they are to be loops."""
        done = int(not self.config.first_norm)  # the first block is not like those that its word comes back for
        words = self.words[done:]
        return done, fold(words) if self.config.scan_layers else words

    @property
    def looped_layers(self) -> tuple[tuple[int, ...], ...]:
        """Numbers in `layers` of those that `scan_layers` runs as one loop; a tuple for each word of the pattern."""
        done, items = self._items
        return tuple(tuple(self.order[done + i] for i in places) for places in looped_blocks(items))

    @property
    def has_auxiliary_loss(self) -> bool:
        """Whether training adds something to its loss for one of the mixers; see `run`."""
        return any(block.has_auxiliary_loss for block in self.layers)

    def init_state(self, batch_size: int, max_len: int | None = None) -> tuple:
        """The state before the first position: one mixer's state a block. Attention needs `max_len`."""
        return tuple(block.init_state(batch_size, max_len, shared=self._shared) for block in self.blocks)

    @property
    def _shared(self) -> dict[str, nnx.Module]:
        """What several depths read, by name."""
        return dict(zip(self.shared_names, self.shared, strict=True))

    def extend(
        self,
        x: Float[Array, "b l d"],
        state: tuple,
        *,
        mask: Bool[Array, "b l"] | None = None,
        segment_ids: Int[Array, "b l"] | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> tuple[Float[Array, "b l d"], tuple]:
        """Goes on from `state` by l positions; any split gives the same as the whole. `rngs` is as in `__call__`."""
        if 0 in x.shape:
            return self._normed(self._enter(x)), state
        self._check_cut(x)
        x, noise, after = self._enter(x), self._noise(rngs), []
        x, mask, segment_ids, leave = _close(x, mask, segment_ids, goes_on=True)
        given = {"mask": mask, "segment_ids": segment_ids, "embeddings": x, "shared": self._shared}

        def run(graphdef, params, x, state, noise):
            key, skip = noise or (None, None)
            block = nnx.merge(graphdef, gathered(params))
            x, state = block.extend(x, state, key=key, skip=skip, **given)
            return placed_rows(x), state

        run = self._recomputed(run)
        for i, (block, block_state) in enumerate(zip(self.blocks, state, strict=True)):
            x, block_state = run(*nnx.split(block), x, block_state, _of_block(noise, i))
            after.append(block_state)
        return leave(self._normed(x)), tuple(after)

    def _recomputed(self, run):
        """What runs a block, and in the backward pass runs it again, if it is to."""
        if not self.config.remat:
            return gathering(run)
        return jax.checkpoint(run, static_argnums=0, policy=_POLICIES[self.config.remat_keeps])

    def _rounding(self, run, wide):
        """`_recomputed` of blocks that read the stream, of dtype `wide`, rounded: all that is kept of it."""

        def change(graphdef, params, carry, noise):
            read, total = carry[0].astype(wide), carry[1]
            y, total = run(graphdef, params, (read, total), noise)
            return y - read, total

        change = self._recomputed(change)

        def rounding(graphdef, params, carry, noise):
            x, total = carry
            added, total = change(graphdef, params, (x.astype(self.config.dtype), total), noise)
            return x + added, total

        return rounding

    def _normed(self, x):
        return x if self.norm_f is None else self.norm_f(x)

    def _noise(self, rngs):
        """(key, share of rows that skip it) of every block, or None."""
        require_rngs(rngs)
        channels = {word.channel for word in self.words if word.channel}
        inside = any(getattr(word_config(self.config, channel), "dropout", 0) for channel in channels)
        if rngs is None or not (self.config.dropout or self.config.drop_path or inside):
            return None
        n = len(self.words)
        return jax.random.split(rngs.dropout(), n), self.config.drop_path * jnp.arange(n) / max(1, n - 1)

    def _enter(self, x):
        dtype = jnp.dtype(self.config.dtype)
        x = x.astype(jnp.promote_types(dtype, jnp.float32) if self.config.residual_in_fp32 else dtype)
        return placed_rows(x)


def _close(x, mask, segment_ids, *, goes_on=False):
    """Rows, mask and segments as they run, and what puts rows back: absent positions blank, and no gaps between."""
    if mask is None:
        return x, mask, segment_ids, lambda x: x
    closed = close_gaps(mask, segment_ids, goes_on=goes_on)
    return closed.close(blank(mask, x)), closed.mask, closed.segment_ids, closed.open


def _of_block(noise, i):
    """A block's own part of the noise of several, or None."""
    return jax.tree.map(lambda a: a[i], noise)
