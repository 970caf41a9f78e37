"""The parts of an engine, made of what a start has loaded."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable

from nanovllm.engine.adapters import Adapters
from nanovllm.engine.draft_times import DraftTimes
from nanovllm.engine.input_processor import InputProcessor
from nanovllm.engine.metrics import EngineMetrics, StatsLog
from nanovllm.engine.mm_processor import MediaPrompts, MMProcessor, Scale
from nanovllm.engine.mm_store import MMStore
from nanovllm.engine.output_processor import OutputProcessor
from nanovllm.engine.owner import OwnerProcess
from nanovllm.engine.preparation import Preparation
from nanovllm.engine.request import EngineInfo
from nanovllm.engine.step_watch import StepWatch
from nanovllm.runner.async_output import AsyncOutput
from nanovllm.runner.runner import Runner
from nanovllm.schedule.adapter_slots import AdapterSlots
from nanovllm.schedule.blocks import BlockPool
from nanovllm.schedule.draft_length import DraftLengths, StepTimes
from nanovllm.schedule.draft_planner import DraftPlanner
from nanovllm.schedule.kv_cache_manager import KVCacheManager
from nanovllm.schedule.past_answers import PastAnswers
from nanovllm.schedule.scheduler import Scheduler
from nanovllm.schedule.snapshots import SnapshotPool
from nanovllm.schedule.whole_images import WholeImages
from nanovllm.startup.load import Loaded
from nanovllm.structured.grammars import GrammarCompiler, GrammarLimits, Grammars


class EngineParts:
    """Makes the parts of an engine, reports their sizes, and frees their memory."""

    def __init__(self, loaded: Loaded) -> None:
        config = loaded.config
        self.config, self.tokenizer, self.model_config = config, loaded.tokenizer, loaded.runner.cfg
        self.load_seconds, self.memory = loaded.seconds, loaded.memory
        self._runner, self._eos_ids = loaded.runner, loaded.eos_ids
        self._sleeper = loaded.sleeper
        layout = self._runner.layout
        self.max_model_len = layout.max_model_len
        self.default_params = loaded.default_params
        self.scheduler = Scheduler(
            KVCacheManager(
                BlockPool(
                    loaded.num_blocks,
                    layout.block_size,
                    enable_prefix_caching=config.enable_prefix_caching,
                ),
                loaded.cache_groups,
                SnapshotPool(loaded.spec.snapshot_slots) if loaded.model.is_recurrent else None,
            ),
            max_num_seqs=layout.max_num_seqs,
            max_num_batched_tokens=layout.prefill_tokens[-1],
            max_decode_rows=layout.decode_rows[-1],
            max_prefill_rows=layout.max_prefill_rows,
            stall=loaded.stall,
            max_proposals=max(layout.verify_tokens, default=1) - 1,
        )
        self.scheduler.adapters = AdapterSlots(config.max_loras) if config.enable_lora else None
        self.scheduler.keeps_images_whole = self.model_config.sees_ahead
        draft = self._runner.spec.draft
        if draft is not None:
            self.scheduler.num_drafts = draft.proposer.num
            self.scheduler.has_known = draft.reads_history
            self.scheduler.past = PastAnswers(draft.num_past) if draft.num_past else None
        self._draft_times = self._adapt_drafts(loaded.step_times)
        run_ahead = config.tuned.run_ahead
        self.run_ahead = self._runner.platform.traits.run_ahead if run_ahead is None else run_ahead
        self._in_flight: deque[AsyncOutput] = deque()
        self.metrics = EngineMetrics(self.scheduler, loaded.expert_stats)
        tower = self._runner.model.tower
        uses_mrope = bool(self.model_config.rope_axes)
        self.media_scale = None
        if tower is not None:
            self.media_scale = Scale.of(tower.config, uses_mrope=uses_mrope)
        self._intake = InputProcessor.of(config, self.tokenizer, self.info)
        prompts = MediaPrompts(
            config.model, self.tokenizer, self.media_scale, loaded.vision, config.media
        )
        self._media = MMProcessor(prompts, config.media)
        self._grammars = self._new_grammars()
        self._held = MMStore(self._runner)
        self.adapters = Adapters(
            self._runner, self.scheduler.adapters, config.num_cpu_loras,
            weakref.WeakMethod(self._adapters_in_use),
        )  # fmt: skip
        self._preparation = Preparation(
            self._intake, self._media, self._grammars, self._held, self.metrics, self.adapters
        )
        self._answers = OutputProcessor(
            self.tokenizer, self.scheduler, self._preparation, self._held, self.metrics
        )
        self._stats_log = (
            None if config.disable_log_stats else StatsLog(self.metrics, self.scheduler)
        )
        self._step_watch = StepWatch(loaded.pace)
        self._num_added = 0
        self._is_closed = False
        self._owner = OwnerProcess()

    def _adapt_drafts(self, times: StepTimes | None) -> DraftTimes | None:
        """Let the scheduler choose the number of draft tokens of each step, if steps were timed."""
        layout, draft = self._runner.layout, self._runner.spec.draft
        if times is None or draft is None:
            return None
        lengths = DraftLengths(times, trial_steps=2 if draft.varies else 1)
        self.scheduler.planner = DraftPlanner(
            lengths,
            varies=draft.varies,
            rests=draft.rests,
            max_rows=layout.max_prefill_rows,
            max_tokens=layout.prefill_tokens[-1],
        )
        return DraftTimes(lengths)

    def _adapters_in_use(self) -> set[int]:
        """The numbers of the adapters of unfinished requests."""
        return {request.adapter_id for request, _ in self._answers.requests.values()}

    def _new_grammars(self) -> Grammars:
        limits = GrammarLimits(self.config.grammar_timeout_s, self.config.max_cached_grammars)
        if self.tokenizer is None:
            return Grammars(None, limits)
        vocab_size = self.model_config.vocab_size
        eos_ids = [token_id for token_id in self._eos_ids if token_id < vocab_size]
        return Grammars(GrammarCompiler(self.tokenizer, vocab_size, eos_ids), limits)

    def close(self) -> None:
        """Free the memory of weights, cache and graphs. Does nothing in a fork of the process."""
        self._is_closed = True
        if not self._owner.is_here:
            return
        self._in_flight.clear()
        self._answers.requests.clear()
        self._preparation.close()
        self._runner.close()
        self._sleeper.close()

    def __del__(self) -> None:
        if hasattr(self, "_owner"):
            self.close()

    def check_ranks(self) -> None:
        """Raise the failure of the ranks, if they have failed."""
        self._runner.check_ranks()

    def call_on_failure(self, callback: Callable[[Exception], None]) -> None:
        """See `WorkerGroup.call_on_failure`."""
        self._runner.call_on_failure(callback)

    @property
    def info(self) -> EngineInfo:
        """The facts that clients need, except the digest of the checkpoint."""
        model, cache = self.model_config, self.scheduler.cache
        pool = cache.pool
        images = WholeImages(cache.groups, pool.num_blocks - 1, self.scheduler.num_drafts)
        return EngineInfo(
            "",
            self.max_model_len,
            self.max_num_seqs,
            model.vocab_size,
            model.hidden_size,
            pool.block_size,
            pool.num_blocks,
            sorted(self._eos_ids),
            self.default_params.non_default(without=("output_kind",)),
            num_deepstack=model.num_deepstack,
            uses_mrope=bool(model.rope_axes),
            has_towers=bool(self._runner.towers.by_name),
            media_scale=self.media_scale,
            whole_images=images if model.sees_ahead else None,
        )

    @property
    def runner(self) -> Runner:
        return self._runner

    @property
    def is_sleeping(self) -> bool:
        """Whether the weights or the cache are asleep."""
        return bool(self._sleeper.asleep)

    def enter_thread(self) -> None:
        """Prepare the calling thread before it first uses the engine."""
        self._runner.platform.enter_thread()

    @property
    def eos_ids(self) -> frozenset[int]:
        """The ids that end an answer by default."""
        return self._eos_ids

    @property
    def max_num_seqs(self) -> int:
        """The most requests that run at the same time."""
        return self.scheduler.max_num_seqs
