"""What each stage of a run needs: memory and time, computed from the model's sizes and what was asked.

Memory is what cannot be dropped (*anonymous*): a checkpoint that is mapped is none, since its pages are read again when
others need the room. Each term is named by what takes it, and says where it comes from; a stage needs what the
program itself takes, and the largest of its phases. docs/large-models.md holds the sum to what was measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from nbl_export.settings import CalibrateSettings, ExportSettings, RunSettings, SelectSettings, choices
from nbl_export.settings.size import bytes_of
from nbl_export.stages.room import WEIGHT_BYTES, Room, Shape, map_weights, rooms

if TYPE_CHECKING:
    import torch

# As many as are decoded across a length by default.
_STEPS = 8
MIB, GIB = 1 << 20, 1 << 30
# Measured: Python with torch; with a model of transformers; with the exporter or onnxruntime.
_TORCH, _PROGRAM, _PROGRAM_ONNX = 200 * MIB, 300 * MIB, 600 * MIB
# Of :func:`nbl_export.models.weights.room`: weights that are used many times stay in memory up to this.
_KEPT = 2 * GIB
# Of nbl_export.linearize.loss: states of the next set are kept up to this.
_NEXT = 512 * MIB
_F64, _F32 = 8, 4
# Tokens of one forward pass while moments are collected, and documents and tokens of one while text is sampled.
_BATCH, _SAMPLED, _SAMPLE_LENGTH = 1024, 256, 128
# The graphs that `verify` runs on tokens: the rewritten one, and the unmodified one with the linear layers put in.
_GRAPHS = 2
# A small copy of a model is traced, exported and run beyond its lengths: 6 to 35 s for those of tests/families.py.
_COPY = 20.0
_LOADS = (
    2  # each command looks at all weights once (are they finite), and each stage reads them for its own work
)


@dataclass(frozen=True)
class Sizes:
    """A model as far as needs depend on it; weights are counted, ``stored`` and ``file`` are bytes.

    ``block`` are the weights of the largest block and ``blocks`` those of all, ``head`` those of the language-model
    head, ``largest`` those of the largest matrix, ``inner`` the widest activation in a block, ``cache`` the numbers
    that a token adds to the KV cache. With ``computed`` weights are dequantized when they are read. ``crossing`` are
    the lengths of the texts that parity has for what begins at a length, ``scores`` the numbers of an attention layer's
    scores on the longest; ``copied`` says whether a length is crossed on a small copy.
    """

    shape: Shape
    block: int
    blocks: int
    head: int
    largest: int
    inner: int
    cache: int
    stored: int
    file: int
    computed: bool = False
    crossing: tuple[int, ...] = ()
    scores: int = 0
    copied: bool = False

    @property
    def longest(self) -> int:
        return max(self.crossing, default=0)

    @property
    def vocabulary(self) -> int:
        return self.head // self.shape.width

    def held(self, width: int, part: int) -> int:
        """Bytes of ``part`` of the weights in memory with ``width`` bytes each; none if they are mapped as they are."""
        return 0 if width == self.stored and not self.computed else width * part

    def kept(self, width: int) -> int:
        """Bytes of the weights where they are used many times: all of a small model, else a block or the head."""
        whole = width * self.shape.weights
        return self.held(width, self.shape.weights if whole <= _KEPT else max(self.block, self.head))


@dataclass(frozen=True)
class Need:
    """What a stage needs: ``phases`` of named bytes, of which the largest counts, and what it computes and reads.

    ``fast`` are floating-point operations in the model's precision, ``exact`` those in float64; ``widened`` are the
    bytes of half-precision weights that are converted to float32, ``seconds`` what takes the same time for every model.
    """

    room: Room
    program: int
    phases: tuple[Mapping[str, float], ...]
    fast: float = 0.0
    exact: float = 0.0
    read: float = 0.0
    widened: float = 0.0
    seconds: float = 0.0

    @property
    def stage(self) -> str:
        return self.room.stage

    @property
    def peak(self) -> Mapping[str, float]:
        """The phase that takes the most."""
        return max(self.phases, key=lambda phase: sum(phase.values()))

    @property
    def memory(self) -> int:
        return self.program + int(sum(self.peak.values()))

    @property
    def most(self) -> str:
        """The name of what takes the most memory, beside the program."""
        return max(self.peak, key=lambda name: self.peak[name])


def needs(sizes: Sizes, asked: RunSettings, width: int) -> list[Need]:
    """The need of each stage of a run as ``asked`` and resolved; the model computes in ``width`` bytes a number."""
    made = {room.stage: room for room in rooms(sizes.shape, asked)}
    sizes = replace(sizes, shape=replace(sizes.shape, parts=asked.calibration.parts))
    found = {
        "calibrate": lambda room: to_calibrate(sizes, asked.calibration, width, room),
        "select": lambda room: to_select(sizes, asked.selection, asked.calibration, width, room),
        "export": lambda room: to_export(sizes, asked.exporting, asked.calibration, room),
        "rewrite": lambda room: to_rewrite(sizes, asked.exporting, room),
    }
    stages = [found[name](room) for name, room in made.items() if name in found]
    return [*stages, to_verify(sizes, asked, Room("verify", 0))]


def to_calibrate(sizes: Sizes, settings: CalibrateSettings, width: int, room: Room) -> Need:
    """Phases: the text is sampled, unless it is given; moments are collected.

    The sums of a layer are there three times when they are written: as sums, as arrays, and as the bytes of the file.
    States are copied when a checkpoint is written; those that take more than ``--memory`` are in files.
    Symmetric products skip three eighths of their multiplications: of xxᵀ, yyᵀ and hhᵀ 5/8 are computed, of yxᵀ and
    yhᵀ all.
    """
    d, layers, tokens = sizes.shape.width, sizes.shape.blocks, calibration_tokens(sizes, settings)
    moments, states = 5 * _F64 * d * d, 2 * width * tokens * d
    limit = float("inf") if settings.memory is None else bytes_of(settings.memory)
    collecting = {
        "a block's weights": sizes.held(width, settings.longest * sizes.block),
        "the moments of a layer": 3 * moments * settings.at_once,
        "states between blocks": states if states <= limit else 0,
        "a batch": _BATCH * (3 * _F64 * d + 4 * width * sizes.inner),
    }
    phases: list[Mapping[str, float]] = [collecting]
    fast, passes = 2.0 * settings.longest * sizes.blocks * tokens, 1.0
    if settings.sources == (choices.SELF,):
        phases.append(
            {
                "weights": sizes.kept(width),
                "the KV cache of sampling": _SAMPLED * _SAMPLE_LENGTH * sizes.cache * width,
                "logits of sampling": 3 * _F32 * _SAMPLED * sizes.vocabulary,
            }
        )
        rows = settings.samples + settings.heldout_samples + settings.selection_samples
        sampled = rows * settings.seq_len
        fast += 2.0 * (sizes.blocks + sizes.head) * sampled
        if width * sizes.shape.weights > _KEPT:
            passes += -(-sampled // (_SAMPLED * _SAMPLE_LENGTH)) * _SAMPLE_LENGTH
    exact = (3 * 1.25 + 4) * d * d * tokens * layers
    seconds = _COPY if sizes.copied else 0.0
    return Need(room, _PROGRAM, tuple(phases), fast, exact, (_LOADS + passes) * sizes.file, seconds=seconds)


def on_device(sizes: Sizes, settings: CalibrateSettings, width: int) -> int:
    """Bytes of a GPU's own memory while moments are collected on it: a block, the sums of a layer, states, a batch."""
    d = sizes.shape.width
    states = width * calibration_tokens(sizes, settings) * d
    sums = settings.at_once * 5 * _F64 * d * d
    return (
        width * settings.longest * sizes.block
        + sums
        + states
        + _BATCH * (3 * _F64 * d + 4 * width * sizes.inner)
    )


def to_select(
    sizes: Sizes, settings: SelectSettings, text: CalibrateSettings, width: int, room: Room
) -> Need:
    """Phases: one layer is fitted; if the criterion is measured, the losses of all candidates are.

    A fit has the layer's moments (5 d²) and about nine matrices beside them: covariances, the Cholesky factors and
    what is solved. Its work is two Cholesky factors, two triangular solves, and W (cho_solve, error): about 7 d³.
    A loss is measured against the original's predictions (2 bytes a token and vocabulary entry); a model that does not
    stay in memory has the states of every version, and is read once for each round of the search.
    """
    d, layers = sizes.shape.width, sizes.shape.blocks
    fitting = {"the moments of a layer": 5 * _F64 * d * d, "the fit of a layer": 9 * _F64 * d * d}
    chosen = _F32 * map_weights(sizes.shape, settings)
    phases: list[Mapping[str, float]] = [{**fitting, "W and b of the chosen layers": chosen}]
    fast, exact = 0.0, 7.0 * d**3 * layers
    read = layers * 5.0 * _F64 * d * d
    criterion = str(settings.criterion)
    if choices.CRITERIA[criterion]:
        tokens = text.selection_samples * text.seq_len
        streams = width * sizes.shape.weights > _KEPT
        k = _chosen(sizes, settings)
        searches = criterion == "greedy"
        states = width * tokens * d * layers
        # A search keeps those of the best set and of the one that is measured, where they have room.
        more = 2 * states if searches and not streams and 2 * states <= _NEXT else 0
        phases.append(
            {
                "weights": sizes.kept(width),
                "W and b of every layer": _F32 * layers * d * d,
                "the original's predictions": 2 * tokens * sizes.vocabulary,
                "logits of a row": 3 * _F32 * text.seq_len * sizes.vocabulary,
                "states of every version": states + more,
            }
        )
        # Each layer alone runs from that layer on, half of the blocks on average; a search runs it on a quarter of the
        # rows, and tries up to eight layers a round.
        versions = layers * 0.5 * (0.25 if searches and not streams else 1) + 1
        rounds = 2.0
        if searches:
            versions += 8 * 0.5 * k
            rounds += k
        fast = 2.0 * tokens * (versions * sizes.blocks + 2 * versions * sizes.head)
        read += (rounds if streams else 1.0) * sizes.file
    if settings.repair:
        step = 3.0 * 2.0 * _BATCH * (sizes.blocks + sizes.head)
        fast += settings.repair * (step + 2.0 * _BATCH * (sizes.blocks + sizes.head))
        phases.append(
            {
                "weights": sizes.kept(_F32),
                "activations of a step": 16 * _F32 * _BATCH * sizes.inner,
                "logits of a step": 4 * _F32 * _BATCH * sizes.vocabulary,
                "W and b, and their optimizer": 3 * chosen,
            }
        )
    program = _PROGRAM if len(phases) > 1 else _TORCH
    return Need(room, program, tuple(phases), fast, exact, read + sizes.file)


def to_export(sizes: Sizes, settings: ExportSettings, text: CalibrateSettings, room: Room) -> Need:
    """The model is traced without weights; the largest matrix is read in float32, converted and written.

    The ranges that fp16 needs are those of the float32 graph, whose head may be transposed when it runs.
    """
    bytes_ = WEIGHT_BYTES[str(settings.precision)]
    largest = sizes.held(_F32, sizes.largest) + (bytes_ * sizes.largest if bytes_ < _F32 else 0)
    phases: list[Mapping[str, float]] = [{"the largest weight": largest}]
    passes, fast = 1.0, 0.0
    if settings.precision == "fp16":
        phases.append(
            {
                "the largest weight": _F32 * sizes.largest,
                "logits of a row": _F32 * max(text.seq_len, sizes.longest) * sizes.vocabulary,
                "scores beyond a length": _F32 * sizes.scores,
            }
        )
        passes, fast = 2.0, 2.0 * sum(sizes.crossing) * (sizes.blocks + sizes.head)
    return Need(room, _PROGRAM_ONNX, tuple(phases), fast, read=(_LOADS - 1 + passes) * sizes.file)


def to_rewrite(sizes: Sizes, settings: ExportSettings, room: Room) -> Need:
    """W and b are read and written layer by layer: one as it is planned, in float64, and as it is written.

    The graph up to the last of them runs on the probe, in parts, each weight in float32.
    """
    d = sizes.shape.width
    phase = {"W of a layer": (_F64 + 2 * _F32) * d * d, "a weight of the graph": _F32 * sizes.inner * d}
    graph, widened = _graph_run(sizes, settings)
    return Need(room, _PROGRAM_ONNX, (phase,), read=2.0 * graph, widened=widened)


def _graph_run(sizes: Sizes, settings: ExportSettings) -> tuple[float, float]:
    """The bytes that a run of the graph reads, and those that it converts to float32, in which a CPU computes."""
    precision = str(settings.precision)
    half = precision in ("fp16", "bf16")
    return WEIGHT_BYTES[precision] * sizes.shape.weights, _F32 * sizes.shape.weights if half else 0


def to_verify(sizes: Sizes, asked: RunSettings, room: Room) -> Need:
    """One after the other: PyTorch's reference in float32, and a session of each graph, whose weights are mapped.

    onnxruntime computes in float32 on a CPU: it converts a half-precision weight when it is used, the head twice where
    it is transposed, as tied ones are. A small model's reference stays beside the sessions.
    """
    text, (graph, widened) = asked.calibration, _graph_run(sizes, asked.exporting)
    tokens = text.heldout_samples * text.seq_len
    runs = _GRAPHS * (1 + asked.verification.decode_steps)
    stays = sizes.kept(_F32) if _F32 * sizes.shape.weights <= _KEPT else 0
    logits = 3 * _F32 * max(text.seq_len, sizes.longest) * sizes.vocabulary
    scores = 2 * _F32 * sizes.scores
    phases = (
        {
            "the reference's weights": sizes.kept(_F32),
            "logits of a row": logits,
            "scores beyond a length": scores,
        },
        {
            "the reference's weights": stays,
            "the head in float32": 2 * _F32 * sizes.head if widened else 0,
            "logits of a row": logits,
            "scores beyond a length": scores,
        },
    )
    # Method loss by two models; of what crosses a length, PyTorch and each graph.
    passes = 1 if asked.exporting.kv_cache != "none" else 1 + asked.verification.decode_steps
    computed = 2.0 * tokens + (1.0 + _GRAPHS) * passes * sum(sizes.crossing)
    fast = 2.0 * computed * (sizes.blocks + sizes.head)
    return Need(
        room, _PROGRAM_ONNX, phases, fast, read=4.0 * sizes.file + runs * graph, widened=runs * widened
    )


def calibration_tokens(sizes: Sizes, settings: CalibrateSettings) -> int:
    return settings.samples * (sizes.shape.row_tokens or settings.seq_len)


def _chosen(sizes: Sizes, settings: SelectSettings) -> int:
    return len(settings.layers) if settings.layers is not None else settings.k or sizes.shape.blocks // 2


def sizes_of(model: torch.nn.Module, stored: int, file: int, computed: bool = False) -> Sizes:
    """The sizes of ``model``, whose weights may be on the meta device.

    ``stored`` bytes has each weight in ``file`` bytes.
    """
    from nbl_export.models.candidates import shared_without_numbers
    from nbl_export.models.layers import attention_layers, block_stack
    from nbl_export.models.lengths import REHEARSAL, crossed_by, crossing_prompts

    shared, layers = shared_without_numbers(model), len(attention_layers(model))
    crossed = crossed_by(model, _STEPS)
    prompts = crossing_prompts(crossed)
    rehearsed = crossed_by(model, _STEPS, room=REHEARSAL)
    parts = [sum(p.numel() for p in block.parameters()) for block in block_stack(model)[1].children()]
    head = getattr(model, "get_output_embeddings", lambda: None)()
    weights = [p for p in model.parameters() if p.ndim > 1]
    inside = [p for block in block_stack(model)[1].children() for p in block.parameters() if p.ndim > 1]
    heads = _configured(model, "num_key_value_heads") or _configured(model, "num_attention_heads") or 0
    size = _configured(model, "head_dim") or 0
    shape = Shape.of(model, _image_tokens(model), layers - len(set(shared.values())))
    return Sizes(
        shape,
        block=max(parts),
        blocks=sum(parts),
        head=0 if head is None else head.weight.numel(),
        largest=max(p.numel() for p in weights),
        inner=max(max(p.shape[-2:]) for p in inside),
        cache=2
        * heads
        * (size or shape.width // max(1, _configured(model, "num_attention_heads") or 1))
        * (layers - len(shared)),
        stored=stored,
        file=file,
        computed=computed,
        crossing=tuple(prompts),
        scores=max(prompts, default=0) ** 2 * (_configured(model, "num_attention_heads") or 1),
        copied=any(one.why and one.reached for one in rehearsed),
    )


def _configured(model: torch.nn.Module, key: str) -> int:
    """A number of the configuration, 0 without one; Gemma 4 refuses attributes that are others in each layer."""
    config: Any = model.config
    text = config.get_text_config()
    try:
        return getattr(text, key, None) or 0
    except Exception:  # of transformers' own
        return text.to_dict().get(key) or 0


def _image_tokens(model: torch.nn.Module) -> int | None:
    """The tokens that the blocks of ``model`` see of an image; None for a model of text."""
    import torch

    from nbl_export.batch.names import PIXELS
    from nbl_export.models.layers import block_stack, image_shape, main_input

    if main_input(model) != PIXELS:
        return None
    seen: list[int] = []
    first = next(block_stack(model)[1].children())
    hook = first.register_forward_hook(lambda _m, args, _o: seen.append(int(args[0].shape[1])))
    try:
        with torch.inference_mode():
            model(torch.zeros(1, *image_shape(model), device=next(model.parameters()).device))
    finally:
        hook.remove()
    return seen[0]
