"""A stack of blocks whose mixers follow a pattern: the body of every model."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from m2.linear import PRODUCT
from ssm.sequence_cut import cut_of
from zoo.layers.depth_router import Skippable
from zoo.layers.mesh_axes import placed_rows
from zoo.layers.needs import has
from zoo.layers.rngs import Seed, as_rngs, require_rngs
from zoo.stack.backbone_config import BackboneConfig, mixer_needs, word_config
from zoo.stack.block import Block, DepthNorms, make_norm, make_shared, shared_name
from zoo.stack.dropping import run_dropping
from zoo.stack.gaps import close_all
from zoo.stack.gathering import gathered, gathering
from zoo.stack.layer_inputs import LayerInputs, groups_of, places_of, plus
from zoo.stack.pattern import Folded, Word, fold, mixer_name, parse_pattern
from zoo.stack.pieces import run_halves, run_in_pieces, takes_halves, takes_pieces
from zoo.stack.scan_layers import looped_blocks, run_blocks

# Linear maps multiply rows with one matrix; products with a batch of them are a mixer's insides, as attention's scores,
# unless the layer gives them a name: block-diagonal maps, those of experts, and long convolutions.
_MATMULS = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable, jax.checkpoint_policies.save_only_these_names(PRODUCT)
)
_POLICIES = {"nothing": None, "matmuls": _MATMULS}


class Backbone(nnx.Module):
    """Blocks and a final normalisation, without an embedding: text, image patches and features all enter.

    Examples:
      >>> backbone = zoo.Backbone(zoo.BackboneConfig(d_model=16, n_layers=2, pattern="mamba"), rngs=0)
      >>> backbone(jnp.ones((2, 10, 16))).shape
      (2, 10, 16)
    """

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
        # Depths that share a block with an earlier one, but not its norms.
        again = [i for i, layer in enumerate(self.order) if self.order.index(layer) < i]
        self.norms_at = tuple(i for i in again if self.blocks[i].norms_apart)
        self.norms = nnx.List([DepthNorms(self.blocks[i], config, rngs=rngs) for i in self.norms_at])

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The block at each depth. `layers` has each block once, where the pattern lets several depths share it; norms
        that depths do not share with it are in `norms`."""
        return tuple(self.layers[i] for i in self.order)

    def __call__(
        self,
        x: Float[Array, "b l d"],
        *,
        mask: Bool[Array, "b l"] | None = None,
        segment_ids: Int[Array, "b l"] | None = None,
        rngs: nnx.Rngs | None = None,
        grid: tuple[int, int] | None = None,
        ahead: Int[Array, "b l"] | None = None,
        layer_inputs: LayerInputs | None = None,
        skippable: Skippable | None = None,
        task: Int[Array, "b"] | None = None,
    ) -> Float[Array, "b l d"]:
        """Runs the stack over whole sequences.

        Args:
          x: input.
          mask: False where a position is not there, whatever lies there and wherever it is. Its output has no meaning.
          segment_ids: documents packed in a row, each a run of equal ids; they never see each other.
          rngs: stream "dropout" switches dropout on; None leaves it off, and is not training: causal blocks with a
            capacity then go by what each position says alone.
          grid: rows and columns of an image whose places the positions are, for mixers that go by them.
          ahead: who sees what comes later (`zoo.layers.seen`): each position `LOOKS_AHEAD`, `SEEN_AHEAD` or 0. None:
            nobody does, where the stack is causal.
          layer_inputs: what is added to the residual stream before some blocks, by their number from 0 (DeepStack).
          skippable: the positions that blocks with a capacity choose among; None: all.
          task: the number of each row's task, where mixtures of experts have a router for each (`MoEConfig.n_tasks`).

        Raises:
          ValueError: a mixer of images without a grid; one that cannot look ahead, such as a state space, with `ahead`;
            layer_inputs of a block that there is not, or of another shape than x.
        """
        given: dict[str, Any] = {"mask": mask, "segment_ids": segment_ids, "grid": grid}
        given |= {"ahead": ahead, "layer_inputs": layer_inputs, "skippable": skippable, "task": task}
        return self.run(x, rngs=rngs, **given)[0]

    def run(
        self,
        x: Float[Array, "b l d"],
        *,
        mask: Bool[Array, "b l"] | None = None,
        segment_ids: Int[Array, "b l"] | None = None,
        rngs: nnx.Rngs | None = None,
        grid: tuple[int, int] | None = None,
        ahead: Int[Array, "b l"] | None = None,
        layer_inputs: LayerInputs | None = None,
        skippable: Skippable | None = None,
        task: Int[Array, "b"] | None = None,
        normed: bool = True,
    ) -> tuple[Float[Array, "b l d"], Float[Array, ""]]:
        """As `__call__`, and what training adds to its loss: the sum of the mixers' auxiliary losses.

        Args:
          normed: False leaves out the final normalisation.

        Raises:
          ValueError: as `__call__`; normed=False where positions are dropped on the way (`keep`).
        """
        norm = self._norm_of_output(normed)
        if 0 in x.shape or self.config.keep is not None:
            given: dict[str, Any] = {"mask": mask, "segment_ids": segment_ids, "grid": grid, "ahead": ahead}
            given |= {"layer_inputs": layer_inputs, "skippable": skippable, "task": task}
            states, loss = self.run_states(x, rngs=rngs, normed=normed, **given)
            return states[-1], loss
        run, carry, each, leave = self._begin(x, mask, segment_ids, rngs, grid, ahead, layer_inputs, skippable, task)
        blocks = [nnx.split(block) for block in self.blocks]
        done, items = self._items
        if done:
            carry = run(*blocks[0], carry, _of_block(each, 0))
        rest = jax.tree.map(lambda a: a[done:], each)
        x, loss = run_blocks(run, items, blocks[done:], rest, carry)
        return leave(norm(x)), loss

    def hidden_states(
        self,
        x: Float[Array, "b l d"],
        *,
        mask: Bool[Array, "b l"] | None = None,
        segment_ids: Int[Array, "b l"] | None = None,
        rngs: nnx.Rngs | None = None,
        grid: tuple[int, int] | None = None,
        ahead: Int[Array, "b l"] | None = None,
        layer_inputs: LayerInputs | None = None,
        skippable: Skippable | None = None,
        task: Int[Array, "b"] | None = None,
    ) -> tuple[Float[Array, "b l d"], ...]:
        """The residual stream before the first block and behind each: n_layers + 1 arrays.

        The convention of transformers' output_hidden_states for BERT, Llama and hybrids: the first is the input, and
        the last is what `__call__` gives, behind the final normalisation where there is one; those between are not
        normalised. (There Mamba leaves out the first, and ViT the last normalisation.) What `layer_inputs` adds before
        a block is in what comes behind it. Blocks run one by one, also with scan_layers.
        """
        given: dict[str, Any] = {"mask": mask, "segment_ids": segment_ids, "grid": grid, "ahead": ahead}
        given |= {"layer_inputs": layer_inputs, "skippable": skippable, "task": task}
        return self.run_states(x, rngs=rngs, **given)[0]

    def run_states(
        self,
        x: Float[Array, "b l d"],
        *,
        mask: Bool[Array, "b l"] | None = None,
        segment_ids: Int[Array, "b l"] | None = None,
        rngs: nnx.Rngs | None = None,
        grid: tuple[int, int] | None = None,
        ahead: Int[Array, "b l"] | None = None,
        layer_inputs: LayerInputs | None = None,
        skippable: Skippable | None = None,
        task: Int[Array, "b"] | None = None,
        normed: bool = True,
    ) -> tuple[tuple[Float[Array, "b l d"], ...], Float[Array, ""]]:
        """As `hidden_states`, and what training adds to its loss. `normed` and errors are those of `run`."""
        norm = self._norm_of_output(normed)
        if 0 in x.shape:
            x = self._enter(x)
            return (*[x] * len(self.blocks), norm(x)), jnp.zeros((), jnp.promote_types(x.dtype, jnp.float32))
        if self.config.keep is not None:
            given: dict[str, Any] = {"mask": mask, "segment_ids": segment_ids}
            given |= {"skippable": skippable, "task": task}
            dropped, loss = run_dropping(self, x, rngs, (ahead, layer_inputs), **given)
            return tuple(dropped), loss
        run, carry, each, leave = self._begin(x, mask, segment_ids, rngs, grid, ahead, layer_inputs, skippable, task)
        states = [carry[0]]
        for i, block in enumerate(self.blocks):
            carry = run(*nnx.split(block), carry, _of_block(each, i))
            states.append(carry[0])
        return (self._enter(x), *map(leave, (*states[1:-1], norm(states[-1])))), carry[1]

    def _norm_of_output(self, normed):
        """What the last block's output goes through."""
        if not normed and self.config.keep is not None:
            raise ValueError(f"normed=False with keep={self.config.keep}, expected a stack that drops no positions")
        return self._normed if normed else lambda x: x

    def _begin(self, x, mask, segment_ids, rngs, grid, ahead, layer_inputs, skippable, task):
        """What runs one block, what enters the first (the stream, no losses yet), each one's own, the way out."""
        self._check_cut(x)
        self._check_ahead(ahead)
        x, noise = self._enter(x), self._noise(rngs)
        x, mask, segment_ids, ahead, added, skippable, leave = close_all(
            x, mask, segment_ids, ahead, groups_of(layer_inputs, x, len(self.words)), skippable
        )
        x = placed_rows(x)
        given = {"mask": mask, "segment_ids": segment_ids, "ahead": ahead, "grid": grid, "embeddings": x}
        given |= {"shared": self._shared, "skippable": skippable, "task": task, "training": rngs is not None}

        def run(graphdef, params, carry, own):
            (x, total), (noise, place, norms) = carry, own
            key, skip = noise or (None, None)
            block = self._block(graphdef, params, norms)
            x, loss = block.run(plus(x, added, place), key=key, skip=skip, **given)
            return placed_rows(x), total + loss.astype(total.dtype)

        whole = self._rounding(run, x.dtype) if self.config.remat_rounds else self._recomputed(run)
        each = noise, places_of(layer_inputs, len(self.words)), self._norms
        start = x, jnp.zeros((), jnp.promote_types(x.dtype, jnp.float32))
        size = self.config.remat_positions
        if size is None or noise is not None:
            return whole, start, each, leave

        def run_by_halves(graphdef, params, norms, x):
            return run_halves(self._block(graphdef, params, norms), x, size, mask=mask, segment_ids=segment_ids)

        halves = jax.checkpoint(run_by_halves, static_argnums=0)

        def run_piecewise(graphdef, params, carry, own):
            block, (x, total) = self._block(graphdef, params, own[2]), carry
            in_pieces = takes_pieces(block, x, size)
            if not in_pieces and not takes_halves(block, x, size):
                return whole(graphdef, params, carry, own)
            x = plus(x, added, own[1])
            if in_pieces:
                return run_in_pieces(block, x, size, mask=mask, segment_ids=segment_ids), total
            return halves(graphdef, params, own[2], x), total

        return run_piecewise, start, each, leave

    def _check_ahead(self, ahead):
        """Raises a ValueError that names a mixer which cannot see what comes later."""
        for word in {} if ahead is None else set(self.words):
            for mixer in word.mixers:
                if "ahead" not in mixer_needs(self.config, mixer):
                    raise ValueError(
                        f"ahead is given to {mixer_name(mixer)}, which reads from left to right: what it gives at a "
                        "position is made of what came before, so nothing behind it can be seen there; expected "
                        "ahead=None, or attention alone"
                    )

    def _check_cut(self, x):
        """Raises a NotImplementedError that names a mixer which may not be called with rows cut over devices."""
        if cut_of(x) is None:
            return
        if self.config.keep is not None:
            raise NotImplementedError(
                f"keep={self.config.keep} on a mesh that cuts rows over devices, but importance is compared in whole "
                "rows: expected --mesh.sequence 1"
            )
        if routed := [str(word) for word in self.words if word.capacity is not None]:
            raise NotImplementedError(
                f"{routed[0]} on a mesh that cuts rows over devices, but its positions are chosen among whole rows: "
                "expected --mesh.sequence 1"
            )
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
        return done, fold(_told_apart(words, self.blocks[done:])) if self.config.scan_layers else words

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
        ahead: Int[Array, "b l"] | None = None,
        layer_inputs: LayerInputs | None = None,
        skippable: Skippable | None = None,
        task: Int[Array, "b"] | None = None,
    ) -> tuple[Float[Array, "b l d"], tuple]:
        """Goes on from `state` by l positions; any split gives the same as the whole.

        The other arguments are those of `__call__`. What is seen ahead is among the l positions: a split leaves out
        what it cuts off.
        """
        if 0 in x.shape:
            return self._normed(self._enter(x)), state
        self._check_cut(x)
        self._check_ahead(ahead)
        x, after = self._enter(x), []
        each = self._noise(rngs), places_of(layer_inputs, len(self.words)), self._norms
        added = groups_of(layer_inputs, x, len(self.words))
        x, mask, segment_ids, ahead, added, skippable, leave = close_all(
            x, mask, segment_ids, ahead, added, skippable, goes_on=True
        )
        given = {"mask": mask, "segment_ids": segment_ids, "ahead": ahead, "embeddings": x, "shared": self._shared}
        given |= {"skippable": skippable, "task": task}

        def run(graphdef, params, x, state, own):
            noise, place, norms = own
            key, skip = noise or (None, None)
            block = self._block(graphdef, params, norms)
            x, state = block.extend(plus(x, added, place), state, key=key, skip=skip, **given)
            return placed_rows(x), state

        run = self._recomputed(run)
        for i, (block, block_state) in enumerate(zip(self.blocks, state, strict=True)):
            x, block_state = run(*nnx.split(block), x, block_state, _of_block(each, i))
            after.append(block_state)
        return leave(self._normed(x)), tuple(after)

    @property
    def _norms(self):
        """Of each depth, the norms that a shared block has there, 0 where it has none or it is not shared; or None."""
        if not self.norms_at:
            return None
        own: dict[int, Any] = dict(zip(self.norms_at, self.norms, strict=True))
        at = [own.get(i, block) if block.norms_apart else None for i, block in enumerate(self.blocks)]
        stacked = {}
        for name in ("norm", "norm2"):
            modules = [getattr(norms, name, None) for norms in at]
            states = [None if module is None else gathered(nnx.state(module)) for module in modules]
            zeros = jax.tree.map(jnp.zeros_like, next(filter(None, states), None))
            if zeros is not None:
                stacked[name] = jax.tree.map(lambda *a: jnp.stack(a), *(state or zeros for state in states))
        return stacked

    @staticmethod
    def _block(graphdef, params, norms):
        """A block as it runs at a depth, with the norms that it has there."""
        block = nnx.merge(graphdef, gathered(params))
        for name, state in (norms or {}).items() if block.norms_apart else ():
            if getattr(block, name) is not None:
                nnx.update(getattr(block, name), state)
        return block

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


def _told_apart(words: Sequence[Word], blocks: Sequence[Block]) -> tuple[Word, ...]:
    """Words of blocks that can be one loop where they are equal: adapters or few bits of some make others of theirs."""
    kinds: dict[Word, list[nnx.GraphDef]] = {}
    found = []
    for word, block in zip(words, blocks, strict=True):
        graphdef, known = nnx.split(block)[0], kinds.setdefault(word, [])
        if graphdef not in known:
            known.append(graphdef)
        number = known.index(graphdef)
        found.append(word._replace(mixers=(*word.mixers, f"kind {number}")) if number else word)
    return tuple(found)


def _of_block(each, i):
    """A block's own part of what several have, or None."""
    return jax.tree.map(lambda a: a[i], each)
