"""The adapter: every trained block of a graph with what is known of its training, and the folder that holds it.

Blocks are kept by task, apart from one another: plugging a task in or out never touches the others' bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn

from contextlora.errors import AdapterError, ConfigError
from contextlora.graph import TaskGraph
from contextlora.lora.attach import attach, attached_state, detach, gated_layers, graph_of
from contextlora.lora.export import CONFIG, Block, block_hash, merged, node, peft_files, peft_targets
from contextlora.lora.folder import MANIFEST, replacing, sha256, write_folder
from contextlora.lora.gates import GateState
from contextlora.lora.record import Record, changes, fits, records_of
from contextlora.lora.store import GRAPH, contents, needed, parts

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True, eq=False)
class Adapter:
    """Trained blocks of one graph on one base model.

    Attributes:
        graph: the tasks. A task without a block is not trained yet, or was pulled out.
        blocks: A (r, d_in) and B (r, d_out) by task and layer path.
        records: what is known of each block's training, by task.
        layers: d_in and d_out of every layer that carries blocks, by path in the model.
        base: name of the base model.
        fingerprint: of the base model's weights; empty if unknown, and then not compared.
        targets: how PEFT is told of `layers`.
        seed: decides the first values of blocks yet to be trained.
    """

    graph: TaskGraph
    blocks: Mapping[str, Block]
    records: Mapping[str, Record]
    layers: Mapping[str, tuple[int, int]]
    base: str = ""
    fingerprint: str = ""
    targets: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("blocks", "records", "layers", "targets"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))
        for task, block in self.blocks.items():
            self._check_block(task, block)

    # --- from a model and back ---------------------------------------------------------------------------------------

    @classmethod
    def of(
        cls,
        model: nn.Module,
        *,
        base: str | None = None,
        seed: int | None = None,
        data: str = "",
        metrics: Mapping[str, Mapping[str, float]] | None = None,
        context: str = "none",
    ) -> Adapter:
        """Copies the trained blocks off a model.

        A block whose B is exactly zero has learned nothing and is left out. The model remembers the adapter that was
        last applied to it or taken off it: blocks whose bytes are the same since keep what is known of them, so that a
        task trained against an older prerequisite is noticed.

        Args:
            model: a model with blocks attached.
            base: name of the base model; None takes the model's own.
            seed: of the run, and of blocks yet to be trained; None takes that of the adapter applied before, or 0.
            data: hash of the training data of the blocks that are new or changed.
            metrics: numbers by task, to be kept with its block.
            context: `TrainConfig.context` of the blocks that are new or changed.

        Raises:
            AdapterError: E303 on a model without blocks.
        """
        graph, layers = graph_of(model), gated_layers(model)
        state = attached_state(model)
        assert state is not None
        known = _last.get(state)
        blocks = {}
        for task in graph.names:
            block = {p: tuple(m.detach().cpu().clone() for m in layer.block(task)) for p, layer in layers.items()}
            if any(bool(b.any()) for _, b in block.values()):
                blocks[task] = block
        seed = seed if seed is not None else known.seed if known else 0
        adapter = cls(
            graph,
            blocks,  # type: ignore[arg-type]
            records_of(graph, blocks, known.records if known else {}, data, seed, metrics or {}, context),  # type: ignore[arg-type]
            layer_shapes(model),
            base or (known.base if known else "") or _name_of(model),
            getattr(model, "contextlora_fingerprint", "") or (known.fingerprint if known else ""),
            peft_targets(model, layers),
            seed,
        )
        _last[state] = replace(adapter, blocks={})
        return adapter

    @torch.no_grad()
    def apply(self, model: Model, *, any_base: bool = False) -> Model:
        """Loads the blocks into a model, in place; attaches the graph first if the model is plain.

        Tasks without a block get their first values anew. On a model with blocks attached, tasks that this adapter
        does not know are left as they are, and blocks of tasks that the model's graph does not name are not loaded.

        Args:
            model: the base model, plain or with blocks attached.
            any_base: load even if the base model's fingerprint is another, as for a quantised copy of it.

        Returns:
            The same model.

        Raises:
            AdapterError: E314 for another base model, E315 for other layers or ranks.
        """
        actual = getattr(model, "contextlora_fingerprint", "")
        if not any_base and self.fingerprint and actual and actual != self.fingerprint:
            raise AdapterError(
                "E314",
                f"was trained on a base with fingerprint {self.fingerprint[:23]}, this one has {actual[:23]}; "
                f"load the same base, or pass any_base=True if this is a copy of it (quantised, say)",
                where=self.base,
            )
        if attached_state(model) is None:
            self._attach(model)
        layers = gated_layers(model)
        same_layers(self.layers, layer_shapes(model))
        graph, state = graph_of(model), attached_state(model)
        shared = [t for t in graph.names if t in self.graph.tasks]
        for task in shared:
            if task in self.blocks:
                _same_shape(task, graph, self.graph)
        for task in shared:
            for path, layer in layers.items():
                if task not in self.blocks:
                    layer.reset(task, self.seed)
                    continue
                for mine, saved in zip(layer.block(task), self.blocks[task][path], strict=True):
                    mine.copy_(saved)
        assert state is not None
        _last[state] = replace(self, blocks={})
        return model

    def _attach(self, model: nn.Module) -> None:
        """Attaches at `layers`, which `attach` made: the same linears of consecutive decoder layers."""
        indices = {next((int(part) for part in path.split(".") if part.isdecimal()), 0) for path in self.layers}
        names = sorted({path.rpartition(".")[2] for path in self.layers})
        try:
            attach(model, self.graph, layers=f"{min(indices)}-{max(indices)}", targets=names, seed=self.seed)
            same_layers(self.layers, layer_shapes(model))
        except ConfigError as e:
            raise AdapterError("E315", f"the model has too few layers: {e.message}", where=max(self.layers)) from None
        except AdapterError:
            detach(model)
            raise

    # --- what is trained ---------------------------------------------------------------------------------------------

    def digest(self) -> str:
        """One SHA-256 over all blocks: the same for the same weights, whatever their order."""
        return sha256("".join(f"{t} {block_hash(self.blocks[t])}\n" for t in sorted(self.blocks)).encode())

    def context(self, task: str) -> Literal["none", "predicted"]:
        """What the prompt of `task` should say of its prerequisites: as in its training, own answers for labels."""
        record = self.records.get(task)
        return "none" if record is None or record.context == "none" else "predicted"

    def missing(self, task: str) -> tuple[str, ...]:
        """The prerequisites of a task, now or when it was trained, that have no block here."""
        self.graph.task(task)
        trained = self.records[task].prerequisites if task in self.records else ()
        return tuple(p for p in dict.fromkeys((*self.graph.prerequisites(task), *trained)) if p not in self.blocks)

    def stale(self) -> dict[str, str]:
        """The tasks that should be trained, or trained again, each with the reason."""
        reasons = {t: self._why_stale(t) for t in self.graph.names}
        return {t: why for t, why in reasons.items() if why}

    def _why_stale(self, task: str) -> str:
        record = self.records.get(task)
        edits = _and(changes(record, self.graph, task)) if record else ""
        if task not in self.blocks:
            if record is None:
                return "not trained yet"
            return f"{edits} changed in {GRAPH}, so its block does not fit" if edits else "its block was removed"
        if record is None:
            return "nothing is known of its training"
        for name, sha in record.prerequisites.items():
            if name not in self.blocks:
                return f"prerequisite '{name}' was removed"
            if name in self.records and self.records[name].sha256 != sha:
                return f"prerequisite '{name}' was retrained after this task"
        return f"{edits} changed in {GRAPH}" if edits else ""

    def with_graph(self, graph: TaskGraph) -> Adapter:
        """The same blocks under an edited graph.

        A block stays, byte for byte, while its task keeps its name, rank and alpha; a task whose rank or alpha is
        another loses its block, since the block does not fit any more, and is to be trained anew.
        """
        records = {t: r for t, r in self.records.items() if t in graph.tasks}
        kept = {t: b for t, b in self.blocks.items() if t in records and fits(records[t], graph, t)}
        return replace(self, graph=graph, blocks=kept, records=records)

    # --- plugging ----------------------------------------------------------------------------------------------------

    def subset(self, tasks: Iterable[str]) -> Adapter:
        """These tasks alone, with the edges among them."""
        graph = self.graph.subgraph(tasks)
        blocks = {t: self.blocks[t] for t in graph.names if t in self.blocks}
        records = {t: self.records[t] for t in graph.names if t in self.records}
        return replace(self, graph=graph, blocks=blocks, records=records)

    def only(self, tasks: Iterable[str]) -> Adapter:
        """These tasks and the prerequisites whose blocks they use."""
        return self.subset(needed(self.graph, tasks))

    def without(self, task: str) -> Adapter:
        """All tasks but one. Its children stay, and are then stale."""
        gone = self.graph.task(task)
        rest = [n for n in self.graph.names if n != task]
        if not rest:
            raise AdapterError(
                "E316", f"'{task}' is the only task; an adapter holds at least one", where=self.graph.name
            )
        if self.graph.prerequisite_rule == "direct":
            return self.subset(rest)
        tasks = dict(self.graph.tasks)  # ancestors are prerequisites: a child keeps those it had through this task
        for child, t in self.graph.tasks.items():
            if task in t.after:
                tasks[child] = t.model_copy(update={"after": tuple(dict.fromkeys((*t.after, *gone.after)))})
        return replace(self, graph=replace(self.graph, tasks=tasks)).subset(rest)

    # --- files -------------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> Path:
        """Writes the adapter folder, replacing an older one at once: a kill leaves the old or the new, each whole.

        Raises AdapterError E319 if `folder` holds something else or cannot be written.
        """
        folder = Path(folder).expanduser()
        return write_folder(folder, contents(self, folder), marker=MANIFEST)

    @classmethod
    def load(cls, folder: str | Path, tasks: Sequence[str] | None = None) -> Adapter:
        """Reads an adapter folder and checks every block against its sha256.

        graph.yaml may have been edited since: see `with_graph` and `stale`. A task whose folder is gone has been
        pulled out: the others load, and `missing` and `stale` say what they lack.

        Args:
            folder: written by `save`.
            tasks: read these and their prerequisites alone.

        Raises:
            AdapterError: E310 to E315, naming the file that is missing, damaged, newer, or not of this adapter.
            ConfigError: for a graph.yaml that is not a graph.
        """
        adapter = cls(**parts(folder, tasks))
        return adapter if tasks is None else adapter.only(tasks)

    def export(self, task: str | Sequence[str], out: str | Path) -> Path:
        """Writes what can be deployed without contextlora.

        Args:
            task: one task: it and its prerequisites as one plain PEFT LoRA, with alpha = rank. Several: an adapter
                folder of these and what they need.
            out: the folder to write.

        Raises:
            AdapterError: E317 if a block that is needed is missing, E319 if `out` cannot be written.
        """
        for name in [task] if isinstance(task, str) else task:
            self._check_complete(name)
        if not isinstance(task, str):
            return self.only(task).save(out)
        block = node(self.graph, self.blocks, task)
        rank = sum(self.graph.rank_of(t) for t in self.graph.active(task))
        return write_folder(out, peft_files(block, rank, self.base, self.targets), marker=CONFIG)

    def export_merged(self, model: nn.Module, task: str, out: str | Path, processor: Any = None) -> Path:
        """Writes the base model with a task and its prerequisites merged into its weights.

        Args:
            model: the base model, plain or with blocks attached; left as it is.
            task: the node to merge.
            out: the folder to write, for `from_pretrained`.
            processor: saved beside it if given.

        Raises:
            AdapterError: E314 or E315 for another model, E317 for a missing block, E318 for a quantised base.
        """
        self._check_complete(task)
        for path, (d_in, d_out) in self.layers.items():
            try:
                found = model.get_submodule(path)
            except AttributeError:
                found = nn.Identity()
            got = (getattr(found, "in_features", None), getattr(found, "out_features", None))
            if got != (d_in, d_out):
                raise AdapterError(
                    "E315", f"the model has {got} features in and out, the adapter {(d_in, d_out)}", where=path
                )
        with replacing(out, marker="config.json") as new, merged(model, node(self.graph, self.blocks, task)):
            model.save_pretrained(new)  # type: ignore[operator]
            if processor is not None:
                processor.save_pretrained(new)
        return Path(out)

    # --- checks ------------------------------------------------------------------------------------------------------

    def _check_block(self, task: str, block: Block) -> None:
        rank = self.graph.rank_of(task)
        for path in sorted(self.layers.keys() ^ block.keys()):
            what = "has no matrices" if path in self.layers else "has matrices for a layer of no other task"
            raise AdapterError("E315", f"task '{task}' {what}", where=path)
        for path, (d_in, d_out) in self.layers.items():
            got = tuple(tuple(m.shape) for m in block[path])
            wanted = ((rank, d_in), (rank, d_out))
            if got != wanted:
                raise AdapterError("E315", f"task '{task}': A and B have shapes {got}, wanted {wanted}", where=path)

    def _check_complete(self, task: str) -> None:
        for t in self.graph.active(task):
            if t not in self.blocks:
                what = f"'{task}'" if t == task else f"'{t}', a prerequisite of '{task}',"
                raise AdapterError(
                    "E317", f"{what} has no block here: train it, plug it in, or drop it", where=self.graph.name
                )


_last: WeakKeyDictionary[GateState, Adapter] = WeakKeyDictionary()
"""What each model was last given, or was last saved as, without its blocks."""


def _name_of(model: nn.Module) -> str:
    """Where transformers loaded the model from; it says "None" for a model that was built."""
    name = str(getattr(model.config, "name_or_path", ""))
    return "" if name == "None" else name


def layer_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """d_in and d_out of the layers that carry blocks, by path."""
    return {path: (layer.in_features, layer.out_features) for path, layer in gated_layers(model).items()}


def same_layers(wanted: Mapping[str, tuple[int, int]], got: Mapping[str, tuple[int, int]]) -> None:
    """Raises AdapterError E315, naming the first layer that differs, what was got and what was wanted."""
    for path in sorted(wanted.keys() | got.keys()):
        if wanted.get(path) != got.get(path):
            text = [f"{s[0]} in, {s[1]} out" if s else "no blocks" for s in (got.get(path), wanted.get(path))]
            raise AdapterError("E315", f"got {text[0]}, wanted {text[1]}", where=path)


def _same_shape(task: str, model: TaskGraph, adapter: TaskGraph) -> None:
    got, wanted = ((g.rank_of(task), g.scale_of(task)) for g in (model, adapter))
    if got != wanted:
        raise AdapterError(
            "E315",
            f"task '{task}': got rank and scale {got} in the model, wanted {wanted} as in the adapter",
            where=model.name,
        )


def _and(words: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1] if words else "")))
