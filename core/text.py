"""Text encoders: prompts in, token embeddings out, for CLIP in chunks of 75 tokens and for the language models of flow transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(eq=False)
class TextEncoder:
    """A CLIP text encoder and its tokenizer, which single files lack.

    `pad_id` replaces the tokenizer's padding where the encoder was trained with another; `penultimate` takes the layer before the
    last (SDXL).
    """

    encoder: Any
    tokenizer: Any = None
    penultimate: bool = False
    pad_id: int | None = None

    @property
    def identity(self) -> tuple[Any, ...]:
        """What the embeddings depend on beside the tokenizer, for `core.identity`."""
        return self.encoder, self.penultimate, self.pad_id

    def tokens(self, prompts: Sequence[str]) -> list[Tensor]:
        """Return the token ids of each prompt as (chunks, T), as the host cuts them: 75 tokens a chunk between start and end.

        Text is taken as it is: weights in parentheses and embeddings are read by the host's CLIP only. Raises ValueError without
        a fitting tokenizer.
        """
        if self.tokenizer is None:
            raise ValueError(
                "Expected a CLIP tokenizer to read prompts, but got none: a single file does not hold it. Give `load` "
                "`tokenizer=`, the tokenizer folder of any Stable Diffusion model, or put such a folder beside the file."
            )
        words = self.tokenizer(list(prompts), add_special_tokens=False, truncation=False, verbose=False).input_ids
        ids = [torch.tensor(self._chunks(each)) for each in words]
        largest = max(int(each.max()) for each in ids)
        if largest >= self.encoder.config.vocab_size:
            raise ValueError(
                f"Expected a tokenizer of at most {self.encoder.config.vocab_size} tokens, but got token {largest}. "
                "Give the tokenizer that belongs to this model."
            )
        return ids

    def _chunks(self, words: list[int]) -> list[list[int]]:
        length = min(self.tokenizer.model_max_length, self.encoder.config.max_position_embeddings)
        start, end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        padding = self.tokenizer.pad_token_id if self.pad_id is None else self.pad_id
        cuts = [words[at : at + length - 2] for at in range(0, max(len(words), 1), length - 2)]
        return [[start, *cut, end, *[padding] * (length - 2 - len(cut))] for cut in cuts]

    def __call__(self, prompts: Sequence[str]) -> list[tuple[Tensor, Tensor | None]]:
        """Return for each prompt its token embeddings (1, chunks * T, D), and the pooled text (1, P) of its first chunk: its projection
        where the encoder has one.

        All chunks are one call.
        """
        ids = self.tokens(prompts)
        counts = [len(each) for each in ids]
        output = self.encoder(torch.cat(ids).to(self.encoder.device), output_hidden_states=self.penultimate)
        hidden = output.hidden_states[-2] if self.penultimate else output.last_hidden_state
        pooled = getattr(output, "text_embeds", getattr(output, "pooler_output", None))
        first = [None] * len(ids) if pooled is None else [part[:1].float() for part in pooled.split(counts)]
        return [(part.float().flatten(0, 1)[None], p) for part, p in zip(hidden.split(counts), first)]


@dataclass(frozen=True)
class Reading:
    """How a transformer reads a language model: the hidden state `layer` of at most `tokens` tokens.

    `template` is put around the prompt, or with `chat` the tokenizer's own; the first `dropped` tokens (the template's) are left
    out. `padded` fills up to `tokens` with padding that counts.
    """

    layer: int
    tokens: int
    template: str = "{}"
    chat: bool = False
    dropped: int = 0
    padded: bool = False

    def text(self, prompt: str, tokenizer: Any) -> str:
        """Return what the encoder is given for `prompt`."""
        if not self.chat or tokenizer.chat_template is None:
            return self.template.format(prompt)
        messages = [{"role": "user", "content": prompt}]
        text: str = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=True
        )
        return text


@dataclass(eq=False)
class LanguageEncoder:
    """A language model (T5, Gemma, Qwen) as a text encoder, with its tokenizer."""

    encoder: Any
    tokenizer: Any
    reading: Reading

    @property
    def identity(self) -> tuple[Any, ...]:
        """What the embeddings depend on beside the tokenizer, for `core.identity`."""
        return self.encoder, self.reading

    def tokens(self, prompts: Sequence[str]) -> list[Tensor]:
        """Return the token ids (1, T) of each prompt; text beyond the encoder's limit is cut off."""
        reading = self.reading
        texts = [reading.text(prompt, self.tokenizer) for prompt in prompts]
        padding = "max_length" if reading.padded else "do_not_pad"
        longest = reading.tokens + reading.dropped
        words = self.tokenizer(texts, padding=padding, max_length=longest, truncation=True, verbose=False).input_ids
        return [torch.tensor([ids]) for ids in words]

    def __call__(self, prompts: Sequence[str]) -> list[tuple[Tensor, Tensor | None]]:
        """Return for each prompt its token embeddings (1, T, D), and None for the pooled text."""
        return [(self._embedded(ids.to(self.encoder.device)), None) for ids in self.tokens(prompts)]

    def _embedded(self, ids: Tensor) -> Tensor:
        states = self.encoder(ids, output_hidden_states=True).hidden_states
        hidden: Tensor = states[self.reading.layer][:, self.reading.dropped :]
        return hidden.float()
