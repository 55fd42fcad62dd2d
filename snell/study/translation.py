"""One translation run: a method trained within a budget on some sentences of a pair, and judged by BLEU and chrF."""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from snell.bench.memory import num_trained
from snell.bench.protocol import cosine
from snell.study.budget import solve
from snell.study.catalogues import Sentences
from snell.study.comparison import Comparison
from snell.study.methods import Method, adapt
from snell.study.parent import TOKENS, Logits, Text
from snell.study.tasks import by_length
from snell.study.training import fit

BATCH = 16
#: sacrebleu's tokenizers of the languages that its default, 13a, cannot cut into words.
CUT = {"zh": "zh", "ja": "char", "ko": "char", "th": "char"}


@dataclass(frozen=True)
class Pair:
    """A language to translate into.

    Attributes:
        kind: ``"near"`` to what the model was pre-trained on, or ``"far"``.
        parts: ``train``, ``validation`` and ``test``, which share no source.
        before: stands before every source; or, where the model's tokenizer knows codes of languages, such a code.
    """

    language: str
    kind: str
    parts: Mapping[str, Sentences]
    before: str


@dataclass(frozen=True)
class Grid:
    """What one comparison keeps the same. ``budget`` is a share of the model's parameters; full tuning has none."""

    parent: str
    pair: str
    sentences: int
    steps: int
    budget: float | None

    def __str__(self) -> str:
        budget = "" if self.budget is None else f", {100 * self.budget:g} %"
        return f"{self.pair}, {self.sentences} sentences{budget}"


def scores(outputs: Sequence[str], references: Sequence[str], language: str) -> dict[str, Any]:
    """sacrebleu's corpus ``bleu`` and ``chrf`` of the outputs, 0 to 100, with their signatures."""
    import sacrebleu  # the report of a study needs no scores

    bleu = sacrebleu.BLEU(tokenize=CUT.get(language.partition("_")[0], "13a"))
    chrf = sacrebleu.CHRF()
    found = {name: metric.corpus_score(list(outputs), [list(references)]).score for name, metric in _named(bleu, chrf)}
    return {**found, **{f"{name}_signature": str(metric.get_signature()) for name, metric in _named(bleu, chrf)}}


def _named(bleu: Any, chrf: Any) -> list[tuple[str, Any]]:
    return [("bleu", bleu), ("chrf", chrf)]


class Speaker(Text):
    """A model's batches for one pair: the code of a language goes where the tokenizer wants it."""

    def __init__(self, model: Any, tokenizer: Any, before: str) -> None:
        super().__init__(model, tokenizer, before)
        self.generating = {}
        if hasattr(tokenizer, "src_lang"):  # mBART, M2M, NLLB: from English
            known = [str(token) for token in tokenizer.get_added_vocab()]
            english = next(
                (code for code in ("en_XX", "eng_Latn", "en") if code in known or f"__{code}__" in known), None
            )
            tokenizer.src_lang = english or tokenizer.src_lang
            tokenizer.tgt_lang, self.before = before, ""
            first = before if before in known else f"__{before}__"
            self.generating = {"forced_bos_token_id": tokenizer.convert_tokens_to_ids(first)}

    @torch.no_grad()
    def translate(self, sources: Sequence[str]) -> list[str]:
        """Greedy translations, those of like lengths together."""
        order = sorted(range(len(sources)), key=lambda index: len(sources[index]))
        found = [""] * len(sources)
        for start in range(0, len(order), 4 * BATCH):
            part = order[start : start + 4 * BATCH]
            inputs = self.encoder([sources[index] for index in part])
            outputs = self.model.generate(
                **inputs, max_new_tokens=TOKENS, num_beams=1, do_sample=False, **self.generating
            )
            texts = self.tokenizer.batch_decode(outputs, skip_special_tokens=True)
            for index, text in zip(part, texts, strict=True):
                found[index] = " ".join(text.split())
        return found


class Translation(Comparison):
    """Comparisons of one model over pairs. Its accuracy is chrF, which low scores of BLEU cannot tell apart."""

    sizes: ClassVar[dict[str, int]] = {"validation": 150, "test": 250}

    def __init__(self, model: Any, tokenizer: Any, pairs: Sequence[Pair], journal: Any, bar: Any, **more: Any) -> None:
        super().__init__(None, model, journal, bar, choosing=(0,), error=0.0, **more)  # type: ignore[arg-type]
        self.tokenizer, self.pairs = tokenizer, {pair.language: pair for pair in pairs}

    def run(self, setting: Any, method: Method, rate: float, draw: int, part: str) -> dict[str, Any]:
        if method.name == "full":
            setting = replace(setting, budget=None)
        return super().run(setting, method, rate, draw, part)

    def choose(self, setting: Any, method: Method) -> tuple[float, dict[float, list[float]]]:
        """The rate is chosen on the first pair of each kind, for all pairs of that kind."""
        kind = self.pairs[setting.pair].kind
        first = next(pair.language for pair in self.pairs.values() if pair.kind == kind)
        return super().choose(replace(setting, pair=first), method)

    def more(self, tests: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        signatures = {name: tests[0][name] for name in ("bleu_signature", "chrf_signature")}
        return {"bleu": [test["bleu"] for test in tests], **signatures}

    def measure(self, setting: Any, method: Method, rate: float, draw: int, judge: str) -> dict[str, Any]:
        pair = self.pairs[setting.pair]
        train, (part, _, size) = pair.parts["train"], judge.partition(":")
        chance = random.Random(f"{draw} {pair.language}")
        shuffled = chance.sample(range(len(train)), len(train))
        if setting.sentences > len(train):
            raise ValueError(f"sentences must be at most the {len(train)} of {pair.language}; got {setting.sentences}")
        judging = pair.parts[part]
        judges = chance.sample(range(len(judging)), min(int(size), len(judging)))
        torch.manual_seed(draw)
        model = self.adapted(setting, method, draw)
        trained = num_trained(model)
        speaker = Speaker(model, self.tokenizer, pair.before)
        order = _order([len(text) for text in train.targets], shuffled[: setting.sentences], setting.steps, draw)
        batches = (speaker.batch([train.sources[i] for i in some], [train.targets[i] for i in some]) for some in order)
        trainable = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trainable, rate, weight_decay=0.0, fused=True)
        seconds = fit(Logits(model), optimizer, cosine(optimizer, setting.steps), batches)
        # Merged, a step of the decoder costs no more than the base model's.
        speaker.model = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
        outputs = speaker.translate([judging.sources[i] for i in judges])
        found = scores(outputs, [judging.targets[i] for i in judges], pair.language)
        middle = sorted(seconds)[len(seconds) // 2]
        return {"accuracy": found["chrf"], **found, "trained": trained, "seconds": middle}

    def adapted(self, setting: Grid, method: Method, draw: int) -> Any:
        """A copy of the model with what the method trains within the budget."""
        model: Any = copy.deepcopy(self.backbone).eval()
        if method.name == "full":
            return adapt(model, method, 0, draw, None)
        if setting.budget is None:
            raise ValueError(f"budget must be given for {method}")
        groups = dict(method.settings).get("groups", 2)
        budget = solve(model, method.name, setting.budget, groups)
        return adapt(model, method, budget.size, draw, None, budget.layers).eval()


def _order(lengths: Sequence[int], chosen: Sequence[int], steps: int, draw: int) -> list[list[int]]:
    """A list of examples for each step."""
    generator = torch.Generator().manual_seed(draw)
    epochs = -(-steps * BATCH // len(chosen))
    picked = torch.tensor(chosen)
    parts = [picked[torch.randperm(len(chosen), generator=generator)] for _ in range(epochs)]
    order: Tensor = by_length(torch.cat(parts)[: steps * BATCH], BATCH, torch.tensor(lengths), generator)
    return [part.tolist() for part in order.split(BATCH)]


def zero_shot(comparison: Translation, pair: Pair) -> dict[str, Any]:
    """Scores of the model as it is, on as many test sentences."""
    test = pair.parts["test"]
    judges = range(min(comparison.sizes["test"], len(test)))
    speaker = Speaker(comparison.backbone.eval(), comparison.tokenizer, pair.before)
    outputs = speaker.translate([test.sources[i] for i in judges])
    return scores(outputs, [test.targets[i] for i in judges], pair.language)
