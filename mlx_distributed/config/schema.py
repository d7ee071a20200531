"""The configuration as frozen dataclasses. The comment under a field says what it means, its unit and its range.

Plain Python: importing this package must not import MLX, so that configurations can be checked anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

LENGTH_MULTIPLE = 8
"""With `packing` or `micro_batch_tokens` the lengths of micro-batches are multiples of it, so that there are few: MLX
keeps buffers by their size."""

Format = Literal["auto", "alpaca", "sharegpt", "messages", "prompt_completion", "text"]
AnswerMetric = Literal["exact_match", "bleu", "chrf", "rouge1", "rouge2", "rougeL"]
AnswerMetricKey = Literal["eval/exact_match", "eval/bleu", "eval/chrf", "eval/rouge1", "eval/rouge2", "eval/rougeL"]
BleuTokenize = Literal["13a", "intl", "zh", "char", "none"]
RougeTokenize = Literal["ascii", "unicode"]


@dataclass(frozen=True)
class QuantizeConfig:
    bits: int | None = None
    """Of frozen weights: 2, 3, 4, 6 or 8, as `mlx_lm.convert -q` makes them, where they are not stored so already."""
    group_size: int = 64
    """Weights that share a scale and an offset: 32, 64 or 128."""


@dataclass(frozen=True)
class ModelConfig:
    path: str | None = None
    """Local folder (relative to the YAML file) or Hugging Face name, loaded through mlx-lm."""
    revision: str | None = None
    """Branch, tag or commit of a Hugging Face model."""
    trust_remote_code: bool = False
    """Let the tokenizer run code that comes with the model."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of the frozen weights with `precision: fp32`; null keeps what is stored. Whatever is trained is float32."""
    quantize: QuantizeConfig = QuantizeConfig()
    scratch: dict[str, Any] | None = None
    """Architecture of a new model, as in a config.json (`model_type`, `hidden_size`, ..., `vocab_size`); its tokenizer
    is trained from the data. Exactly one of `path` and `scratch` is given."""


@dataclass(frozen=True)
class LoraConfig:
    rank: int = 8
    """Inner width of an update."""
    alpha: float | None = None
    """Update is scaled by alpha / rank. Default 16. Not together with `scale`."""
    scale: float | None = None
    """The factor itself, as mlx-lm calls it."""
    dropout: float = 0.0
    """On the input of each adapter, while training; from 0 up to 1."""
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """All linear layers, or a list of names inside a layer, such as `self_attn.q_proj` or `q_proj`."""
    num_layers: int = -1
    """The last so many layers; -1 means all."""

    @property
    def effective_scale(self) -> float:
        """The factor that the update is multiplied by."""
        if self.scale is not None:
            return self.scale
        return (16.0 if self.alpha is None else self.alpha) / self.rank


@dataclass(frozen=True)
class SourceConfig:
    path: str = ""
    """File (.json, .jsonl, .parquet), folder of such files, or Hugging Face dataset name."""
    format: Format = "auto"
    """Of the rows; `auto` finds it out from the columns of the whole file, or of the first rows of a stream."""
    split: str = "train"
    """Of a Hugging Face dataset."""
    subset: str | None = None
    """Configuration name of a Hugging Face dataset."""
    columns: dict[str, str] = field(default_factory=dict)
    """Our column name -> theirs, as in {instruction: question, output: answer}."""
    roles: dict[str, str] = field(default_factory=dict)
    """Their role name -> ours (system, user, assistant, tool, function_call)."""
    weight: float = 1.0
    """Passes over this source per epoch: 2 shows each row twice, 0.5 shows half of them, then another half. With
    `streaming`, its rows in proportion to those of the others."""


@dataclass(frozen=True)
class DataConfig:
    train: tuple[SourceConfig, ...] = ()
    """Sources to train on: a list, or one alone; a source is a mapping or just a path."""
    validation: tuple[SourceConfig, ...] = ()
    """Sources to measure with, written alike; never trained on."""
    val_fraction: float = 0.0
    """Share of the training rows held out, chosen by seed. Not together with `validation`."""
    max_seq_length: int = 2048
    """In tokens, prompt and answer together."""
    packing: bool = False
    """Lay the rows of a micro-batch one after the other in place of side by side, so that nothing is padded. What is
    trained stays the same: a row sees itself alone, at its own positions."""
    overlong: Literal["drop", "truncate", "error"] = "drop"
    """What becomes of longer rows: left out and counted, cut at the end and counted, or the run refused."""
    train_on: Literal["assistant", "last", "all"] = "assistant"
    """Loss on every assistant turn, on the last one only, or on every token."""
    train_on_eos: bool = True
    """Loss on the stop token that ends a trained turn."""
    chat_template: str | None = None
    """Jinja text, or a file with it; null takes the tokenizer's own."""
    alpaca_style: Literal["chat", "classic"] = "chat"
    """`classic` is the prompt of Stanford Alpaca as plain text, for base models."""
    merge_turns: bool = True
    """Join neighbouring turns of one role with a blank line; false refuses such rows."""
    max_invalid_fraction: float = 0.1
    """The run is refused when a larger share of the rows is invalid."""
    streaming: bool = False
    """Read and tokenise training rows ahead of the steps that need them, for data larger than memory: .jsonl and
    .parquet files, folders of these and Hugging Face datasets. Needs `train.max_steps`; a source that ends begins
    again."""
    shuffle_buffer: int = 10_000
    """With `streaming`, so many rows that follow each other are shuffled. Sources are mixed by their `weight`."""
    cache_dir: Path | None = None
    """With `streaming`, the folder of tokenised rows, which runs on the same data can share, and from which nothing is
    ever removed; null takes `cache` in `output_dir`, from which a run removes those of other settings."""


@dataclass(frozen=True)
class TrainConfig:
    global_batch_size: int = 8
    """Sequences per optimizer step over all workers. Pins the run, whatever the number of workers."""
    micro_batch_size: int = 4
    """Sequences that a device holds at a time; must divide `global_batch_size`."""
    micro_batch_tokens: int | None = None
    """Tokens that a device holds at a time, padding too; wins over `micro_batch_size`. At least `data.max_seq_length`.
    A step then has as many micro-batches as its rows need."""
    epochs: float = 1.0
    """Passes over the data."""
    max_steps: int | None = None
    """Optimizer steps; wins over `epochs`."""
    max_grad_norm: float | None = 1.0
    """Clip by global norm; null does not clip."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """What MLX computes on; auto takes its default. The same bits run after run are promised on the CPU."""
    gradient_checkpointing: bool = False
    """Keep a layer's input only and compute the layer again in the backward pass."""
    memory_budget: str | None = None
    """Of each worker, such as `12GB`, for all that MLX holds. A run that would take more is refused before it starts,
    and in elastic training a worker that is killed is started again with half of what it computes at a time."""
    neftune_noise_alpha: float | None = None
    """Noise on the embeddings in training, uniform within alpha / sqrt(tokens in a row x width); usual are 5 to 15."""

    @property
    def num_microbatches(self) -> int:
        """Micro-batches per optimizer step over all workers; not with `micro_batch_tokens`."""
        return self.global_batch_size // self.micro_batch_size


@dataclass(frozen=True)
class OptimizerConfig:
    name: Literal["adamw"] = "adamw"
    """AdamW with bias correction and float32 moments."""
    learning_rate: float = 1e-4
    """At the end of the warm-up. 1e-4 to 2e-4 suits LoRA, 1e-5 the whole of a trained model."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the first and of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.01
    """Decoupled; never on norms and biases."""
    shard: bool = False
    """Every worker keeps the moments of its share of the parameters alone, updates those and sends them to the others,
    in place of summed gradients. Does not change the result; checkpoints fit either way. Workers that are left when one
    is lost cannot save by themselves."""


@dataclass(frozen=True)
class SchedulerConfig:
    name: Literal["cosine", "linear", "constant"] = "cosine"
    """How the rate falls after the warm-up."""
    warmup_steps: int | None = None
    """Optimizer steps in which the rate rises linearly. Not together with `warmup_ratio`."""
    warmup_ratio: float | None = None
    """Share of all steps. Default 0.03 where `warmup_steps` is not given."""
    min_lr_ratio: float = 0.0
    """The rate at the end as a share of `optimizer.learning_rate`."""


@dataclass(frozen=True)
class DilocoConfig:
    sync_every: int = 32
    """Steps between two exchanges of the same parameters. Steps cost next to no traffic between them: many with a small
    `train.global_batch_size`, and a learning rate lower by the root of it, learn more than few with a large one."""
    fragments: int = 4
    """Parts that the parameters are exchanged in, one after the other within `sync_every` steps; a layer is not cut."""
    overlap_steps: int = 0
    """A sum may travel during so many steps before it is applied; fewer than lie between two fragments. 0 waits for it,
    and learns a little more in as many steps."""
    outer_learning_rate: float = 0.7
    """Of the step along the mean difference."""
    outer_momentum: float = 0.5
    """Nesterov's, of those steps. 0.5 was the best in runs of ten exchanges, 0.9 is what is published for hundreds."""


@dataclass(frozen=True)
class PipelineConfig:
    num_stages: int = 1
    """Workers that one copy of the model is spread over, each with some of its layers. The number of workers is a
    multiple of it: so many copies train side by side. 1 leaves the model in one piece."""
    split: Literal["auto"] | tuple[int, ...] = "auto"
    """Layers of each stage, as in [12, 20]; `auto` makes the stages alike in time, by the speeds of the workers, as far
    as their memory allows."""
    speeds: Literal["auto"] | tuple[float, ...] = "auto"
    """Of the workers, in any unit, one each in rank order; `auto` measures them where they are on several machines, and
    takes them for alike on one."""
    schedule: Literal["1f1b", "gpipe", "interleaved", "zb-h1", "auto"] = "1f1b"
    """When a worker computes what; the result is the same. `interleaved` gives every worker `chunks` stages, `zb-h1`
    computes the gradients of weights when nobody waits, `auto` simulates each of them and takes the fastest."""
    chunks: int = 1
    """Stages of each worker, for `interleaved`."""
    in_flight: Literal["auto"] | int = "auto"
    """Micro-batches that the first worker holds at a time, with `1f1b` and `zb-h1`; the others hold fewer, down to one.
    `auto` is twice the workers less one, which hides links that take as long as a forward pass; with `activations:
    keep`, as many as there are workers; with `schedule: auto`, another number where that is faster or these do not
    fit."""
    activations: Literal["recompute", "keep"] = "recompute"
    """What is held of a micro-batch until its backward pass: its input alone, or all that was computed, which is faster
    by a third and takes that memory for every micro-batch under way."""
    wire_dtype: Literal["fp32", "bf16", "int8"] = "fp32"
    """Of activations and their gradients between workers in training; `fp32` sends them as they are. Of a float32 model
    `bf16` sends half the bytes, and `int8` a quarter, with a scale for every 256 values."""


@dataclass(frozen=True)
class ParallelConfig:
    nproc: int = 1
    """Workers to start on this machine (`--nproc`)."""
    num_workers: int | None = None
    """Workers on all machines, where some are on others: those join with the string that this one prints, and nobody
    can come or go later. null: all are on this one."""
    listen: str | None = None
    """With `num_workers`, the address of this machine as the others reach it, host:port, such as `192.168.1.20:4000`;
    port 0 takes a free one. Everything between machines is encrypted."""
    backend: Literal["grpc", "native"] = "grpc"
    """`native` is the group of `mx.distributed`, for a run started by `mlx.launch`; it sums in an order of its own."""
    share: Literal["even", "speed"] | tuple[float, ...] = "even"
    """How the micro-batches of a step are shared: evenly, by these weights, one per worker, or with `elastic.enabled`
    by the speeds that are measured. Does not change the result."""
    wire: Literal["fp32", "bf16", "fp16", "int8", "int4"] = "fp32"
    """How gradients travel. With `fp32` the sum is exact and the same bits on any number of workers; the others send a
    half to an eighth of the bytes, and what rounding leaves out is sent with the next step."""
    bandwidth: Literal["auto", "even"] | tuple[float, ...] = "auto"
    """Of the workers' links: who has a slow one sums less for the others. `auto` measures them where the workers are on
    several machines, and takes them for alike on one; or give them in any unit, one per worker. Does not change the
    result in `fp32`."""
    sync: Literal["step", "delayed", "diloco"] = "step"
    """When workers agree. `step`: in every step, on the same bits as one worker. `delayed`: gradients travel while the
    next step is computed, and are one update old when they are applied. `diloco`: workers train by themselves and
    exchange differences now and then, a hundredth of the bytes; `share` then says how many updates each makes."""
    delay_compensation: float = 0.0
    """With `delayed`, how strongly gradients are corrected for what parameters have changed since; 0 does not, and
    saves the memory of a copy of what is trained."""
    diloco: DilocoConfig = DilocoConfig()
    pipeline: PipelineConfig = PipelineConfig()
    timeout_s: float = 300.0
    """A worker that another one waits for and that sends nothing for so long is given up."""
    port: int = 0
    """Worker r of a machine listens on port + r, on the loopback interface or, with `num_workers`, on that of `listen`;
    0 takes free ports. The groups of a pipeline take free ones besides."""

    @property
    def size(self) -> int:
        """Workers of the run, on all machines."""
        return self.num_workers or self.nproc


@dataclass(frozen=True)
class ElasticConfig:
    enabled: bool = False
    """Workers may leave, be lost and join while the run goes on, and the result is the same bits."""
    min_workers: int = 1
    """With fewer nobody trains: those that are there wait for more."""
    wait_s: float = 600.0
    """After waiting so long for workers the run is given up. A worker that has saved since the coordinator is away ends
    when it has waited so long for it."""
    coordinator_grace_s: float = 600.0
    """When the coordinator has been away for so long, workers save; they go on waiting for it, for `elastic.wait_s`."""
    listen: str | None = None
    """Address of the coordinator as other machines reach it, host:port, such as `192.168.1.20:4000`; port 0 takes a
    free one. Everything is encrypted then, and `mlx-train --join` lets workers on other machines in. null serves this
    machine alone."""


@dataclass(frozen=True)
class EvalConfig:
    steps: int | None = None
    """Evaluate every so many steps; null only at the end."""
    at_start: bool = False
    """Evaluate before the first step too, to see what training has changed."""
    max_examples: int | None = None
    """The first so many rows are used for generation; null takes all. The loss is over the full validation set."""
    generate: bool = False
    """With each evaluation, also generate greedily for validation prompts and compare with the data (`metrics`)."""
    metrics: tuple[AnswerMetric, ...] = ("exact_match",)
    """How generated answers are compared. BLEU and chrF are those of sacrebleu, ROUGE the F1 of rouge-score without
    stemming. Loss and perplexity are always measured. BLEU is 0 where no answer has four words."""
    bleu_tokenize: BleuTokenize = "13a"
    """Words of BLEU as sacrebleu names them; `zh` and `char` for languages without spaces."""
    rouge_tokenize: RougeTokenize = "ascii"
    """Words of ROUGE: `ascii` is rouge-score's, which knows a-z and 0-9 alone; `unicode` knows all letters, and takes
    each character of Chinese and Japanese for a word."""
    max_new_tokens: int = 128
    """At most so many tokens per generated answer."""
    num_samples: int = 3
    """Generated samples to print at the end. All are in samples.jsonl."""
    patience: int | None = None
    """Stop early when `checkpoint.metric_for_best` has not become better in so many evaluations in a row; null never
    does."""
    min_delta: float = 0.0
    """With `patience`, what counts as better: by more than this."""


@dataclass(frozen=True)
class CheckpointConfig:
    steps: int | None = 100
    """Save every so many steps; null only at the end."""
    save_total_limit: int | None = 3
    """Newest checkpoints to keep; null keeps all. The best one is kept besides."""
    keep_best: bool = True
    """Also save and keep the checkpoint that is the best by `metric_for_best`."""
    metric_for_best: Literal["eval/loss", "eval/perplexity"] | AnswerMetricKey = "eval/loss"
    """By which evaluations are compared. The lowest loss is the best, or perplexity, and the highest of any other."""
    final: Literal["last", "best"] = "last"
    """What `final/` holds: the model after the last step, or that of the best checkpoint."""


@dataclass(frozen=True)
class LoggingConfig:
    steps: int = 1
    """Write a metrics line every so many steps."""


@dataclass(frozen=True)
class WandbConfig:
    project: str | None = None
    """Weights & Biases is off unless this is set."""
    entity: str | None = None
    """User or team that owns the run; null takes your default."""
    name: str | None = None
    """Of the run; null lets Weights & Biases make one up."""
    group: str | None = None
    """Runs of one group are shown together; null makes one of the run where `system_metrics` needs it."""
    job_type: str | None = None
    """Kind of the run within its group, such as `train`."""
    notes: str | None = None
    """What the run is for, in words."""
    mode: Literal["online", "offline", "disabled"] = "online"
    """`offline` keeps everything in the output folder for `wandb sync`. WANDB_MODE wins over `online`."""
    tags: tuple[str, ...] = ()
    """Words to find the run by."""
    log_checkpoints: bool = False
    """Upload checkpoints as artifacts, aliases `latest`, `best` and `step-N`."""
    log_final: bool = False
    """Upload the finished model as an artifact, aliases `latest`, `final` and `step-N`."""
    system_metrics: bool = False
    """Processor, memory, disk and network of every worker, and not of rank 0 alone: each other one has a run of its own
    in the group for them, with job type `worker`."""


@dataclass(frozen=True)
class Config:
    model: ModelConfig = ModelConfig()
    method: Literal["lora", "dora", "full"] = "lora"
    """What is trained; `full` means everything, embeddings and head too."""
    lora: LoraConfig = LoraConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """What the model computes in; what is trained, its summed gradients and its moments are float32 anyway. `bf16` and
    `fp16` hold frozen weights in 16 bits too; `fp16` scales the loss, and all workers leave out a step whose gradient
    is too large for it. With `fp32` layers compute in the type of frozen weights, see `model.dtype`."""
    parallel: ParallelConfig = ParallelConfig()
    elastic: ElasticConfig = ElasticConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    wandb: WandbConfig = WandbConfig()
    seed: int = 0
    """Of the order of the rows, new weights and dropout."""
    output_dir: Path = Path("runs/default")
    """Relative to the YAML file, like every path in it."""

    @property
    def base(self) -> ModelConfig:
        """`model` with the type that its weights are loaded in: of `precision` where they are frozen."""
        if self.precision == "fp32" or self.method == "full":
            return self.model
        return replace(self.model, dtype="bfloat16" if self.precision == "bf16" else "float16")
