"""From examples to token ids: prompts through the model's own chat template, answers, and padded batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from contextlora.data.examples import Example
from contextlora.data.images import open_image
from contextlora.errors import AdapterError
from contextlora.graph import TaskGraph


@dataclass(frozen=True)
class Sample:
    """One question about one example, tokenised.

    Attributes:
        key: identifies prompt and answer, for caches.
        prompt: token ids up to where the answer starts, image placeholders expanded.
        answer: token ids of the answer with its end token; empty when there is none to learn.
    """

    key: str
    task: str
    image: Path | None
    prompt: tuple[int, ...]
    answer: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


@dataclass(frozen=True)
class Batch:
    """Right-padded samples.

    Attributes:
        input_ids: (samples, tokens).
        attention_mask: (samples, tokens) 1 on real tokens.
        predicts: (samples, tokens) True where the next token is part of the answer.
        targets: (n,) those next tokens, in row order.
        owner: (n,) the sample each of them belongs to.
    """

    samples: tuple[Sample, ...]
    input_ids: Tensor
    attention_mask: Tensor
    predicts: Tensor
    targets: Tensor
    owner: Tensor

    @property
    def tasks(self) -> list[str]:
        """The task of each sample."""
        return [s.task for s in self.samples]

    @property
    def prompt(self) -> Tensor:
        """(samples, tokens) True where a token belongs to the prompt."""
        lengths = torch.tensor([len(s.prompt) for s in self.samples])
        return torch.arange(self.input_ids.shape[1]) < lengths[:, None]


def collate(samples: Sequence[Sample], pad: int, width: int | None = None) -> Batch:
    """Pads samples on the right into one batch, as wide as the longest or as `width` says."""
    width = max(map(len, samples)) if width is None else width
    ids = torch.full((len(samples), width), pad)
    mask = torch.zeros(len(samples), width, dtype=torch.long)
    predicts = torch.zeros(len(samples), width, dtype=torch.bool)
    for row, s in enumerate(samples):
        ids[row, : len(s)] = torch.tensor(s.prompt + s.answer)
        mask[row, : len(s)] = 1
        predicts[row, len(s.prompt) - 1 : len(s) - 1] = True
    owner, at = predicts.nonzero(as_tuple=True)
    return Batch(tuple(samples), ids, mask, predicts, ids[owner, at + 1], owner)


def answer_text(options: Sequence[str]) -> str:
    """How a set of chosen options is written: separated by ", ", in the task's declared order."""
    return ", ".join(options)


def with_context(question: str, known: Mapping[str, Sequence[str]]) -> str:
    """The question after the prerequisites' answers (`context: gold` and `predicted`)."""
    if not known:
        return question
    return "Known: " + "; ".join(f"{t}: {answer_text(a)}" for t, a in known.items()) + ".\n" + question


class Encoder:
    """Turns examples into samples with a model's processor (or tokenizer, for text-only models).

    Args:
        processor: a transformers processor or tokenizer.
        graph: the tasks whose questions are asked.
    """

    def __init__(self, processor: Any, graph: TaskGraph):
        self.processor, self.graph = processor, graph
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.sees_images = self.tokenizer is not processor
        if self.tokenizer.eos_token_id is None:
            raise AdapterError("E335", "the tokenizer has no end-of-sequence token, so an answer would have no end")
        self.end: int = self.tokenizer.eos_token_id
        self.pad: int = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.end

    def sample(
        self,
        example: Example,
        task: str,
        *,
        answer: Sequence[str] | None = None,
        known: Mapping[str, Sequence[str]] | None = None,
    ) -> Sample:
        """One question about one example; with `answer`, the answer's tokens too."""
        question = with_context(example.questions.get(task, self.graph.task(task).question), known or {})
        ids = () if answer is None else self.answer_ids(answer)
        key = repr((example.id, question, ids))
        return Sample(key, task, example.image, self.prompt_ids(question, example.image), ids)

    @lru_cache(maxsize=4096)  # noqa: B019  an encoder lives as long as its run
    def _answer_ids(self, text: str) -> tuple[int, ...]:
        return (*self.tokenizer(text, add_special_tokens=False).input_ids, self.end)

    def answer_ids(self, options: Sequence[str]) -> tuple[int, ...]:
        """Token ids of an answer, closed by the end token."""
        return self._answer_ids(answer_text(options))

    def prompt_ids(self, question: str, image: Path | None) -> tuple[int, ...]:
        """Token ids of the whole prompt, with one placeholder for each token of the image."""
        text = self._template(question, image is not None)
        if image is None:
            return self._text_ids(text)
        if self._same_tokens_for_any_image:
            return self._image_ids(text)
        return tuple(self.image_inputs(text, open_image(image))["input_ids"][0].tolist())

    def image_inputs(self, text: str, image: Image.Image) -> dict[str, Tensor]:
        """The processor's tensors for one prompt with one image."""
        special = self._wants_special(text)
        return dict(self.processor(text=[text], images=[image], return_tensors="pt", add_special_tokens=special))

    @cached_property
    def image_prompt(self) -> str:
        """A prompt that holds one image and next to nothing else, to compute its features with."""
        return self._template("", True)

    @cached_property
    def _same_tokens_for_any_image(self) -> bool:
        """Whether image size leaves the prompt as it is; then no image is decoded to tokenise a question."""
        sizes = ((64, 48), (90, 300), (1600, 1200))  # some processors cut only large images into tiles
        first, *others = (self.image_inputs(self.image_prompt, Image.new("RGB", size))["input_ids"] for size in sizes)
        return all(torch.equal(first, other) for other in others)

    @lru_cache(maxsize=65536)  # noqa: B019
    def _image_ids(self, text: str) -> tuple[int, ...]:
        return tuple(self.image_inputs(text, Image.new("RGB", (64, 64)))["input_ids"][0].tolist())

    @lru_cache(maxsize=65536)  # noqa: B019
    def _text_ids(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=self._wants_special(text)).input_ids)

    def _wants_special(self, text: str) -> bool:
        """Whether the tokenizer should add its own start token: the rule of transformers' `apply_chat_template`.

        A tokenizer's template is complete. A processor's (LLaVA's) may leave the start token to the tokenizer.
        """
        if not self.sees_images:
            return not self._has_template
        return not (self.tokenizer.bos_token and text.startswith(self.tokenizer.bos_token))

    @property
    def _has_template(self) -> bool:
        return bool(getattr(self.processor, "chat_template", None))

    @lru_cache(maxsize=65536)  # noqa: B019
    def _template(self, question: str, image: bool) -> str:
        if not self._has_template:
            mark = f"{getattr(self.processor, 'image_token', '<image>')}\n" if image else ""
            return f"{mark}Question: {question}\nAnswer: "
        content: Any = [{"type": "image"}] * image + [{"type": "text", "text": question}]
        if not self.sees_images:
            content = question
        chat = [{"role": "user", "content": content}]
        return str(self.processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False))
