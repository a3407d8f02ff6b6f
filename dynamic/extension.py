"""Dynamic-LLaVA as an extension of llava: the predictors, their flags, and what happens at the sparse layer.

Corresponds to `train_sparse.py`, `dynamic_llava_trainer.py` and `dynamic_llava_llama.py` of the original. With labels
tokens are masked, by a policy that attention obeys from the sparse layer on; without, they are dropped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from dynamic import inference
from dynamic import model as sparse_model
from dynamic import original as convert
from dynamic.attention import interface
from dynamic.config import FLAG_RANGES, TOPK, SparseConfig, SparseOptions
from dynamic.inspection import DecisionLog, patch_indices, record_decisions
from dynamic.kept_text import KeptTokens, answer_tokens, instruction_tokens
from dynamic.sequence import valid_positions
from dynamic.statistics import KeepStatistics
from dynamic.training import MaskedPass, TemperatureSchedule
from llava.details import AnsweredRow, KeptPatches, KeptWords, Observation, Said
from llava.errors import CheckpointError, FlagError
from llava.extension import Config, Extension, ImportedState, ParameterGroup, RunOptions
from llava.model.language_model.masks import layer_kinds
from llava.runtime import checkpointing
from llava.runtime.ranges import check_ranges
from llava.segments import DecoderState, MultimodalInputs, Segments

if TYPE_CHECKING:
    from transformers import Cache, TrainerCallback


class DynamicExtension(Extension):
    """Predictors that drop tokens; the configuration is `SparseConfig.to_dict()`, the original's `sparse_config`."""

    name = "dynamic"
    options = SparseOptions
    rates = ("predictor_lr",)

    def __init__(self) -> None:
        # Per model, and gone with it: one extension may serve several models.
        self._schedules: WeakKeyDictionary[nn.Module, TemperatureSchedule] = WeakKeyDictionary()
        self._statistics: WeakKeyDictionary[nn.Module, KeepStatistics] = WeakKeyDictionary()

    def configure(self, args: RunOptions) -> Config | None:
        """The configuration of the predictors if `--dynamic` is on.

        Raises:
            FlagError: a value is refused, or an option is given that nothing carries out.
        """
        options: SparseOptions = args.options[self.name]
        if not options.dynamic:
            _refuse_idle_options(options)
            return None
        if checkpointing.asks_for_reentrant(args.training):
            raise FlagError(
                "--gradient_checkpointing_kwargs asks for use_reentrant, under which the loss does not reach the "
                'predictors of --dynamic through attention; pass {"use_reentrant": false} or leave the flag out'
            )
        if args.model.attn_implementation not in (None, "sdpa", interface.NAME):
            raise FlagError(
                f"--attn_implementation {args.model.attn_implementation}: --dynamic trains with an attention of its "
                "own, which is as lean; leave the flag out"
            )
        check_ranges(options, FLAG_RANGES)
        try:
            return options.config().to_dict()
        except ValueError as error:
            raise FlagError(f"{error} (the flags have the same names)") from error

    def unused_options(self, options: Mapping[str, Any]) -> Collection[str]:
        """Settings of predictors that are switched off."""
        output = options["use_text_predictor"] and options["use_output_text_predictor"]
        instruct = options["use_text_predictor"] and options["use_instruct_predictor"]
        of_vision = ("vision_keep_rate", "vision_decision", "nhead", "dim_feedforward", "num_layers")
        weighted = output or instruct or (options["use_vision_predictor"] and options["vision_decision"] != TOPK)
        return {
            *(() if weighted else ("mask_loss_weight",)),
            *(() if options["use_vision_predictor"] else of_vision),
            *(() if options["use_text_predictor"] else ("use_output_text_predictor", "use_instruct_predictor")),
            *(() if output else ("output_text_keep_rate", "output_text_len_for_training")),
            *(() if instruct else ("instruct_keep_rate", "instruct_len_for_training")),
        }

    def packing_problem(self, config: Config) -> str | None:
        """Predictors and policy attention take a row as one sample."""
        return "its predictors judge the image and the answer of one sample a row, and its attention masks their tokens"

    def attach(self, model: nn.Module, config: Config) -> None:
        """Add the predictors; their parameters are float32 whatever the base is.

        Raises:
            CheckpointError: the configuration is damaged, the decoder is too shallow, or its attention has a window.
        """
        host: Any = model
        windows = sorted(set(layer_kinds(host.config)) - {"full_attention"})
        if windows:
            raise CheckpointError(
                f"extension '{self.name}': layers of this backbone have {windows} (sliding_window "
                f"{host.config.sliding_window}), and a window over a sequence with gaps is another one than it was "
                "trained with; take a backbone without window, or set sliding_window to null in its config.json if no "
                "sequence is longer"
            )
        try:
            sparse_model.attach(model, SparseConfig.from_dict(config))
        except ValueError as error:
            raise CheckpointError(f"extension '{self.name}': {error}") from error

    def on_inputs(self, model: nn.Module, config: Config, inputs: MultimodalInputs) -> MultimodalInputs:
        """Decide how this batch is made sparse: tokens are masked if a loss will be wanted, dropped otherwise."""
        masked = None
        if inputs.labels is not None:
            masked = MaskedPass(self._schedule(model).tau if model.training else None)
        # In the segments, so that it belongs to this batch alone, whatever becomes of the pass.
        return dataclasses.replace(inputs, segments=[_noted(row, masked) for row in inputs.segments])

    def loss_problem(self, config: Config, segments: Sequence[Segments] | None) -> str | None:
        """Tokens are masked for a loss, and dropped without one: which it is, `on_inputs` decides."""
        if _masked_pass(segments) is not None:
            return None
        return (
            "it was not told that a loss is wanted; pass ids and images, or call `extensions.on_inputs` on what "
            "`build_inputs` gives, with labels, and hand over the `segments` of its result"
        )

    def before_layer(self, model: nn.Module, config: Config, index: int, state: DecoderState) -> DecoderState:
        """Let the predictors judge what enters the sparse layer; without a loss, drop what they do not keep."""
        if index != config.get("sparse_layer", SparseConfig.sparse_layer):
            return state
        settings = sparse_model.settings(model)
        rate = config.get("vision_keep_rate", settings.vision_keep_rate)
        if rate != settings.vision_keep_rate:  # of this call
            settings = dataclasses.replace(settings, vision_keep_rate=rate)
        masked = _masked_pass(state.segments)
        if masked is not None:
            policy = masked.decide(settings, sparse_model.predictors(model), state.hidden_states, state.segments)
            if policy is not None:
                _pass_on(policy, model, state)
            inference.store_all(state)
            return state
        return inference.drop_tokens(model, settings, state)

    def attention_implementation(self, config: Config) -> str | None:
        """Attention that obeys a policy; without one it is transformers' "sdpa"."""
        return interface.register()

    def make_cache(self, model: nn.Module, config: Config) -> Cache | None:
        """A cache of kept tokens."""
        return inference.make_cache(model, SparseConfig.from_dict(config))

    def losses(self, model: nn.Module, config: Config, inputs: MultimodalInputs) -> dict[str, Tensor]:
        """The weighted keep-rate losses `image`, `output_text` and `instruct` of the predictors that exist.

        With `vision_decision` "topk" the share of the image is exact, and the first is left out.
        """
        masked = _masked_pass(inputs.segments)
        if masked is None:
            return {}
        if model.training:
            self._statistics.setdefault(model, KeepStatistics()).add(masked.decisions)
        return masked.losses(SparseConfig.from_dict(config), sparse_model.predictors(model))

    def metrics(self, model: nn.Module, config: Config) -> dict[str, float]:
        """What `KeepStatistics.pop` says of the passes in training since the last call, and `tau`."""
        kept = self._statistics[model].pop() if model in self._statistics else {}
        return {**kept, "tau": self._schedule(model).tau}

    def observe(self, model: nn.Module, config: Config) -> AbstractContextManager[Observation] | None:
        """Kept patches of each image, kept words of the last instruction and of the answer."""
        return _kept(model) if inference.drops_tokens(SparseConfig.from_dict(config)) else None

    def parameter_groups(self, model: nn.Module, config: Config, args: RunOptions) -> list[ParameterGroup]:
        """The predictors with their own learning rate and weight decay."""
        options: SparseOptions = args.options[self.name]
        parameters = [parameter for _, parameter in sparse_model.added_parameters(model)]
        return [ParameterGroup("predictors", parameters, options.predictor_lr, options.predictor_weight_decay)]

    def callbacks(self, model: nn.Module, config: Config, args: RunOptions) -> list[TrainerCallback]:
        """The schedule of the temperature."""
        options: SparseOptions = args.options[self.name]
        self._schedules[model] = TemperatureSchedule(options.gumbel_start_tau, options.gumbel_end_tau)
        return [self._schedules[model]]

    def _schedule(self, model: nn.Module) -> TemperatureSchedule:
        """Outside a run of the Trainer the temperature stays at the default start."""
        if model not in self._schedules:
            self._schedules[model] = TemperatureSchedule(SparseOptions.gumbel_start_tau, SparseOptions.gumbel_end_tau)
        return self._schedules[model]

    def named_parameters(self, model: nn.Module, config: Config) -> Iterator[tuple[str, nn.Parameter]]:
        """Every parameter of the predictors."""
        return sparse_model.added_parameters(model)

    def import_checkpoint(self, folder: Path) -> ImportedState | None:
        """Read a folder written by the original, known by the `sparse_config` in its `config.json`.

        Raises:
            CheckpointError: the configuration is damaged, or the weights lack a predictor that it switches on.
        """
        try:
            config = convert.read_config(folder)
            if config is None:
                return None
            claimed = convert.predictor_names(folder)  # looks at every file, so a damaged one is named
            return ImportedState(config.to_dict(), convert.read_predictors(folder, config), claimed)
        except ValueError as error:
            raise CheckpointError(str(error)) from error

    def export_checkpoint(self, model: nn.Module, config: Config, folder: Path) -> None:
        """Add the predictors to the full weights in `folder` and `sparse_config` to its `config.json`.

        Raises:
            CheckpointError: there are no full weights, the only place that the original has for predictors.
        """
        try:
            convert.add_to_folder(folder, SparseConfig.from_dict(config), dict(sparse_model.added_parameters(model)))
        except ValueError as error:
            raise CheckpointError(str(error)) from error


def _noted(row: Segments, masked: MaskedPass | None) -> Segments:
    """A row that belongs to a pass with a loss, or to one without."""
    others = {name: note for name, note in row.notes.items() if name != DynamicExtension.name}
    return dataclasses.replace(row, notes=others if masked is None else others | {DynamicExtension.name: masked})


def _masked_pass(segments: Sequence[Segments] | None) -> MaskedPass | None:
    """The pass with a loss that a batch belongs to, or None."""
    found: MaskedPass | None = segments[0].notes.get(DynamicExtension.name) if segments else None
    return found


@contextmanager
def _kept(model: nn.Module) -> Iterator[_Kept]:
    with record_decisions(model) as log:
        yield _Kept(model, log)


@dataclass
class _Kept:
    """What is said of an answer.

    Attributes:
        model: with predictors.
        log: its decisions.
        padding: for each row the positions in front of its prompt.
    """

    model: nn.Module
    log: DecisionLog
    padding: list[int] = field(default_factory=list)

    def enter_layer(self, index: int, state: DecoderState) -> None:
        """See `llava.details.Observation`."""
        if index == 0 and state.segments is not None and not self.padding:
            self.padding = valid_positions(state).to(torch.uint8).argmax(dim=1).tolist()

    def details(self, answered: AnsweredRow) -> Sequence[Said]:
        """See `llava.details.Observation`; features that are not patches of an image are not drawn."""
        host: Any = self.model
        tower, row, log = host.get_vision_tower(), answered.index, self.log
        found: list[Said] = []
        if tower is not None and tower.interval is None:
            side, first = tower.num_patches_per_side, tower.num_features - tower.num_patches
            for number, kept in enumerate(log.prompts[0].images(row)):
                found.append(KeptPatches(number, (side, side), tuple(patch_indices(kept, first, side * side))))
        instruction = instruction_tokens(log, answered.input_ids, row=row, padding=self.padding[row])
        for tokens in (instruction, answer_tokens(log, answered.output_ids, row=row)):
            found.append(partial(_words_of, tokens, answered.tokenizer))
        return found


def _words_of(tokens: KeptTokens, tokenizer: Any) -> KeptWords:
    segment = tokens.segment(tokenizer)
    return KeptWords(segment.title, tuple((word.text, word.kept) for word in segment.words))


def _pass_on(policy: Tensor, model: nn.Module, state: DecoderState) -> None:
    """Let all following layers attend by `policy` (B, L), with the 2-D padding mask where that says everything.

    Raises:
        FlagError: the attention is one that would ignore the policy.
    """
    attention = model.config._attn_implementation  # type: ignore[union-attr]
    if attention != interface.NAME:
        raise FlagError(
            f"a loss of 'dynamic' needs the attention '{interface.NAME}', but the model was given '{attention}', "
            f"which knows no policy; call model.set_attn_implementation('{interface.NAME}'), or load it without "
            "use_flash_attn and attn_implementation"
        )
    state.layer_kwargs["policy"] = policy
    # `attach` refuses windows, and samples are packed into one row without a 2-D mask only.
    if state.attention_mask is not None:
        state.causal_mask = state.attention_mask


def _refuse_idle_options(options: SparseOptions) -> None:
    """Raise if an option was given that nothing carries out while `--dynamic` is off."""
    idle = [
        f"--{option.name} {getattr(options, option.name)}"
        for option in dataclasses.fields(options)
        if getattr(options, option.name) != option.default
    ]
    if idle:
        raise FlagError(f"{', '.join(idle)}: without effect while --dynamic is off; pass --dynamic True")
