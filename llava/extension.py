"""The protocol through which an extension enters the model: eight seams and nothing else.

An extension is a subclass of `Extension`, named in the entry-point group `llava.extensions`. Every hook has a
do-nothing default. `llava` itself imports no extension, but for one program that is about one of them,
`dynamic/visualize.py`; `docs/architecture.md` explains the seams with examples.

Shapes are written with the letters of `docs/architecture.md` ("Letters of shapes"), the same in all packages.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from torch import Tensor, nn

from llava.details import AnsweredRow, Observation, Said
from llava.errors import FlagError
from llava.segments import DecoderState, MultimodalInputs, Segments

if TYPE_CHECKING:
    from transformers import Cache, TrainerCallback

    from llava.encoded_images import EncodedImages

ENTRY_POINT_GROUP = "llava.extensions"

Config = dict[str, Any]
"""What an extension needs to rebuild itself: JSON values only. Stored in `config.json` under `extensions`."""

LayerVisit = Callable[[int, DecoderState], DecoderState]
"""Called before each decoder layer of one pass, with its index and what enters it."""


class RunOptions(Protocol):
    """The options of a run as an extension sees them; `llava.train.options.RunArguments` in training.

    Attributes:
        model: base model, tower, projector.
        data: data files and image handling.
        training: everything of transformers' Trainer, and LoRA.
        options: parsed options of each installed extension, by its name.
        given: names of the options that were written down.
        base: what the base was trained with; `base.values` has the settings of images by the names of their options.
    """

    model: Any
    data: Any
    training: Any
    options: dict[str, Any]
    given: frozenset[str]
    base: Any


@dataclass
class ParameterGroup:
    """Parameters with a learning rate and weight decay of their own (seam 7).

    `None` means the value of the run (`--learning_rate`, `--weight_decay`).
    """

    name: str
    parameters: list[nn.Parameter]
    learning_rate: float | None = None
    weight_decay: float | None = None


@dataclass
class ImportedState:
    """What an extension read from a folder written by the original code (seam 8).

    Attributes:
        config: configuration to `attach` with.
        tensors: the extension's tensors under our names, relative to the LLaVA model.
        claimed: file names in the folder, or names of tensors in `non_lora_trainables.bin` or full weights, that nobody
            else needs to read.
    """

    config: Config
    tensors: dict[str, Tensor]
    claimed: frozenset[str]


class Extension:
    """Base class of all extensions; override what is needed.

    `model` is always the bare LLaVA (`LlavaForCausalLM`), never a PEFT or DeepSpeed wrapper. `config` is the value that
    `configure` (training) or a checkpoint (loading) gave.
    """

    name: ClassVar[str]
    """Key in `config.json`, folder name under `extensions/`, prefix of logged values."""

    options: ClassVar[type | None] = None
    """Dataclass of command-line options, or None. Names must not collide with any other option."""

    rates: ClassVar[tuple[str, ...]] = ()
    """Those of its options that are learning rates of all that it adds; empty where that has the run's rate."""

    core_options: ClassVar[tuple[str, ...]] = ()
    """Options of the core about LoRA that it reads, so that they have an effect although LoRA is off."""

    transient: ClassVar[bool] = False
    """True: it is in use for a while, and part of no checkpoint."""

    adjustable: ClassVar[frozenset[str]] = frozenset()
    """Settings that may be edited in a checkpoint's `extensions/<name>/config.json`, to use it in another way."""

    # 1. Flags
    def configure(self, args: RunOptions) -> Config | None:
        """Turn the parsed flags into a configuration; None leaves the extension off. May set options of the core.

        `args.given` tells which options the user wrote down.

        Raises:
            FlagError: the options contradict each other; the message names the flags.
        """
        return None

    def unused_options(self, options: Mapping[str, Any]) -> Collection[str]:
        """Names of those of its options that have no effect under the others; they are not recorded."""
        return ()

    def packing_problem(self, config: Config) -> str | None:
        """Why it cannot be trained on packed rows, or None if it can; asked before anything is loaded.

        In packed rows `inputs.segments` has an entry for each sample, and `inputs.packed` says where the samples are.
        An extension that looks at tokens one by one, or at samples by `packed`, returns None.
        """
        return "it does not say that it keeps the samples of a row apart"

    # 2. Inputs
    def on_inputs(self, model: nn.Module, config: Config, inputs: MultimodalInputs) -> MultimodalInputs:
        """See and change a spliced batch; called once per sequence, not for each decoded token."""
        return inputs

    def on_images(self, model: nn.Module, config: Config, images: EncodedImages) -> None:
        """See the images of a batch between tower and projector, and set their `features` or `notes`.

        Called of all extensions if one of them `wants_images`; else nothing is recorded. The number of positions of an
        image stays: to leave some out, note them, and drop them before a layer.
        """

    def wants_images(self, config: Config) -> bool:
        """Whether `on_images` has something to see; by default it has if the extension defines it."""
        return type(self).on_images is not Extension.on_images

    def loss_problem(self, config: Config, segments: Sequence[Segments] | None) -> str | None:
        """Why a loss cannot be computed of embeddings that a caller has spliced, or None.

        Asked where `labels` come without ids, so that `on_inputs` was the caller's business.

        Args:
            config: of the extension.
            segments: that the caller hands over.
        """
        return None

    # 3. Modules
    def attach(self, model: nn.Module, config: Config) -> None:
        """Replace or wrap sub-modules in place, found by class. Base weights keep their state-dict keys.

        Tower and projector are in place by then; LoRA is not. Added parameters keep the dtype they are given here, in
        training and when a checkpoint is loaded: float32, whatever the base is, unless there is a reason.
        """

    # 4. Layer boundary
    def before_layer(self, model: nn.Module, config: Config, index: int, state: DecoderState) -> DecoderState:
        """Transform what enters decoder layer `index`; tokens may be dropped here and nowhere else."""
        return state

    def layer_visit(self, model: nn.Module, config: Config, state: DecoderState) -> LayerVisit | None:
        """What to call before each layer of one pass, asked in front of the first; None: nothing in this pass.

        By default `before_layer`, if the extension has one. An extension that knows everything in front of the first
        layer changes `state` here (`layer_kwargs` reaches every layer) and returns None.
        """
        if type(self).before_layer is Extension.before_layer:
            return None
        return functools.partial(self.before_layer, model, config)

    # 5. Attention and cache
    def attention_implementation(self, config: Config) -> str | None:
        """Name registered with transformers' `AttentionInterface` and `AttentionMaskInterface`, or None for no wish."""
        return None

    def make_cache(self, model: nn.Module, config: Config) -> Cache | None:
        """A cache of the extension's own for generation, or None for the default one."""
        return None

    # 6. Losses
    def losses(self, model: nn.Module, config: Config, inputs: MultimodalInputs) -> dict[str, Tensor]:
        """Extra losses by name, each a weighted scalar averaged over the samples; added to the LM loss and logged."""
        return {}

    def metrics(self, model: nn.Module, config: Config) -> dict[str, float]:
        """Values to log beside the losses since the last call; called when the trainer logs."""
        return {}

    def observe(self, model: nn.Module, config: Config) -> AbstractContextManager[Observation] | None:
        """Watch one `generate`, for a reader who wants to see what the model did; None: there is nothing to see.

        Only asked where somebody wants details of an answer, and never during training.
        """
        return None

    # 7. Training
    def parameter_groups(self, model: nn.Module, config: Config, args: RunOptions) -> list[ParameterGroup]:
        """Groups for the extension's own parameters that need another learning rate or weight decay."""
        return []

    def callbacks(self, model: nn.Module, config: Config, args: RunOptions) -> list[TrainerCallback]:
        """Trainer callbacks, for example a temperature schedule."""
        return []

    def untrained_parameters(self, model: nn.Module, config: Config) -> Iterable[nn.Parameter]:
        """Of its parameters those on which no loss depends under this configuration; saved, but not trained."""
        return ()

    # 8. State
    def named_parameters(self, model: nn.Module, config: Config) -> Iterator[tuple[str, nn.Parameter]]:
        """Every parameter that the extension added, by its name in `model`: exactly these are trained and saved."""
        return iter(())

    def import_checkpoint(self, folder: Path) -> ImportedState | None:
        """Read a folder written by the original code of the method; None if the folder is not of that kind."""
        return None

    def export_problem(self, config: Config) -> str | None:
        """Why the original's layout cannot hold this configuration, or None; asked before a model is built."""
        return None

    def export_checkpoint(self, model: nn.Module, config: Config, folder: Path) -> None:
        """Add the extension's part to a folder in the original's layout (`non_lora_trainables.bin` and the like)."""
        raise FlagError(f"the extension '{self.name}' has no original layout to export to")


@dataclass(frozen=True)
class Attached:
    """An extension that is switched on, with its configuration."""

    extension: Extension
    config: Config


class ExtensionSet:
    """The extensions attached to one model, in the order in which they were attached."""

    def __init__(self, attached: Iterable[Attached] = ()) -> None:
        self._attached: list[Attached] = list(attached)
        self._observations: list[Observation] = []
        self._own: ExtensionSet | None = None

    @property
    def own(self) -> ExtensionSet:
        """Those of the model itself, where others are in use for a call or for a while."""
        return self if self._own is None else self._own

    def __iter__(self) -> Iterator[Attached]:
        return iter(self._attached)

    def __len__(self) -> int:
        return len(self._attached)

    @property
    def configs(self) -> dict[str, Config]:
        """Configuration by name, as written into `config.json`."""
        return {item.extension.name: item.config for item in self.own if not item.extension.transient}

    def with_extension(self, extension: Extension, config: Config) -> ExtensionSet:
        """Another set that has one more, or another configuration of one that is there; for one call.

        What watches this set now watches the other one too.
        """
        new, there = Attached(extension, config), False
        found = ExtensionSet()
        for item in self:
            same = item.extension.name == extension.name
            found._attached.append(new if same else item)
            there = there or same
        if not there:
            found._attached.append(new)
        return self._derived(found)

    def without(self, name: str) -> ExtensionSet:
        """Another set that lacks one."""
        return self._derived(ExtensionSet(item for item in self if item.extension.name != name))

    def _derived(self, found: ExtensionSet) -> ExtensionSet:
        found._observations, found._own = self._observations, self.own
        return found

    def replace_by(self, other: ExtensionSet) -> ExtensionSet:
        """Become `other`, and return what this set was; nothing is attached or taken away in the model."""
        before = ExtensionSet(self._attached)
        before._own = self._own
        self._attached = list(other)
        self._own = before if other._own is self else other._own
        return before

    @property
    def sees_images(self) -> bool:
        """True if one of them wants to see images."""
        return any(item.extension.wants_images(item.config) for item in self)

    def on_images(self, model: nn.Module, images: EncodedImages) -> None:
        """Seam 2, in front of the projector, of all extensions in turn."""
        for item in self:
            item.extension.on_images(model, item.config, images)

    def attach(self, model: nn.Module, extension: Extension, config: Config) -> None:
        """Attach one more extension to `model`.

        Raises:
            FlagError: it is attached already, or needs another attention than an attached one.
        """
        if any(extension.name == item.extension.name for item in self):
            raise FlagError(f"the extension '{extension.name}' is attached to this model already")
        attention = extension.attention_implementation(config)
        for item in self:
            other = item.extension.attention_implementation(item.config)
            if None not in (attention, other) and attention != other:
                raise FlagError(
                    f"'{item.extension.name}' needs the attention '{other}', '{extension.name}' needs '{attention}'; "
                    "switch one of them off"
                )
        extension.attach(model, config)
        self._attached.append(Attached(extension, config))
        if attention is not None:
            model.set_attn_implementation(attention)  # type: ignore[operator]

    def reconfigure(self, name: str, config: Config | None) -> None:
        """Note what an extension has become: another configuration, or None if nothing of it is left.

        Its modules are the business of whoever changed them, for example by merging.
        """
        found = [(item, config if item.extension.name == name else item.config) for item in self._attached]
        self._attached = [Attached(item.extension, kept) for item, kept in found if kept is not None]

    def on_inputs(self, model: nn.Module, inputs: MultimodalInputs) -> MultimodalInputs:
        """Seam 2 of all extensions in turn."""
        for item in self:
            inputs = item.extension.on_inputs(model, item.config, inputs)
        return inputs

    def check_loss(self, segments: Sequence[Segments] | None) -> None:
        """Refuse a loss of embeddings that an extension cannot take part in (seam 2).

        Raises:
            FlagError: names the extension and the reason.
        """
        for item in self:
            problem = item.extension.loss_problem(item.config, segments)
            if problem is not None:
                raise FlagError(f"a loss of embeddings with the extension '{item.extension.name}': {problem}")

    def layer_visits(self, model: nn.Module, state: DecoderState) -> tuple[LayerVisit, ...]:
        """Seam 4: what extensions and observations want called before each layer of one pass, in turn."""
        visits = (item.extension.layer_visit(model, item.config, state) for item in self)
        watching = (functools.partial(_watch, observation) for observation in self._observations)
        return (*filter(None, visits), *watching)

    @contextmanager
    def observe(self, model: nn.Module) -> Iterator[Callable[[AnsweredRow], dict[str, Sequence[Said]]]]:
        """Let every extension watch what `model` generates while the block runs (seam 6).

        Yields:
            A function that gives, for a row whose answer has just ended, what each extension says, by its name;
            extensions that say nothing are left out.
        """
        with ExitStack() as stack:
            offers = {item.extension.name: item.extension.observe(model, item.config) for item in self}
            watching = {name: stack.enter_context(offer) for name, offer in offers.items() if offer is not None}
            before, self._observations = self._observations, [*self._observations, *watching.values()]
            try:
                yield lambda answered: {
                    name: details for name, each in watching.items() if (details := each.details(answered))
                }
            finally:
                self._observations = before

    def make_cache(self, model: nn.Module) -> Cache | None:
        """The first cache that an extension offers (seam 5).

        Raises:
            FlagError: two extensions want a cache of their own.
        """
        offers = [(item, item.extension.make_cache(model, item.config)) for item in self]
        offers = [(item, cache) for item, cache in offers if cache is not None]
        if len(offers) > 1:
            names = ", ".join(item.extension.name for item, _ in offers)
            raise FlagError(f"these extensions each want a key-value cache of their own: {names}; switch one off")
        return offers[0][1] if offers else None

    def losses(self, model: nn.Module, inputs: MultimodalInputs) -> dict[str, Tensor]:
        """Extra losses of all extensions, as `<extension>/<loss>` (seam 6)."""
        return {
            f"{item.extension.name}/{name}": loss
            for item in self
            for name, loss in item.extension.losses(model, item.config, inputs).items()
        }

    def metrics(self, model: nn.Module) -> dict[str, float]:
        """Logged values of all extensions, as `<extension>/<metric>` (seam 6)."""
        return {
            f"{item.extension.name}/{name}": value
            for item in self
            for name, value in item.extension.metrics(model, item.config).items()
        }

    def untrained_parameters(self, model: nn.Module) -> list[nn.Parameter]:
        """Parameters of all extensions on which no loss depends (seam 7)."""
        return [weight for item in self for weight in item.extension.untrained_parameters(model, item.config)]

    def named_parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Parameters of all extensions by their name in `model` (seam 8)."""
        return {
            name: parameter
            for item in self.own
            for name, parameter in item.extension.named_parameters(model, item.config)
        }


def _watch(observation: Observation, index: int, state: DecoderState) -> DecoderState:
    observation.enter_layer(index, state)
    return state


def installed_extensions(names: Sequence[str] | None = None) -> dict[str, Extension]:
    """Instances of the extensions that installed packages declare, by name, sorted.

    Args:
        names: load only these; None loads all.

    Raises:
        FlagError: two packages declare the same name, an entry point is not an `Extension`, or one of `names` is
            not installed (the message lists those that are).
    """
    found: dict[str, Extension] = {}
    for point in sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda point: point.name):
        if names is not None and point.name not in names:
            continue
        loaded = point.load()
        if not (isinstance(loaded, type) and issubclass(loaded, Extension)):
            raise FlagError(f"entry point '{point.name}' = '{point.value}' is no subclass of llava.extension.Extension")
        if point.name != loaded.name:
            raise FlagError(f"entry point '{point.name}' names an extension that calls itself '{loaded.name}'")
        if point.name in found and type(found[point.name]) is not loaded:
            raise FlagError(f"two installed packages declare the extension '{point.name}'; uninstall one of them")
        found[point.name] = loaded()
    missing = sorted(set(names or ()) - set(found))
    if missing:
        raise FlagError(f"extension(s) {missing} not installed; installed: {sorted(found) or 'none'}")
    return found
