"""Texts as vectors, by a frozen text encoder of transformers. Needs transformers: `pip install "cdit[text]"`."""

from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from cdit.common.errors import UserError


@torch.no_grad()
def encode_texts(encoder: str, texts: Sequence[str]) -> Tensor:
    """The mean of the encoder's last hidden state over the tokens of each text: (N, E) float32, on the CPU.

    Args:
        encoder: a text model of transformers: its name on the Hugging Face hub, or its folder. For an encoder-decoder
            (T5) the encoder is used, for a model of images and texts (CLIP) the text model.
        texts: N, not empty.

    Raises:
        UserError: transformers is not installed, or there is no such model, or its weights are not in safetensors.
    """
    try:
        from transformers import AutoModel, AutoTokenizer
    except ImportError as error:
        raise UserError('data.text_encoder needs transformers: pip install "cdit[text]"') from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(encoder)
        model = AutoModel.from_pretrained(encoder, use_safetensors=True, dtype=torch.float32).eval()
        model = model.get_encoder() if model.config.is_encoder_decoder else getattr(model, "text_model", model)
        vectors = []
        for text in tqdm(texts, desc="encoding texts", unit="text", leave=False):
            tokens = tokenizer(text, truncation=True, return_tensors="pt")
            tokens = {name: tokens[name] for name in ("input_ids", "attention_mask")}
            vectors.append(model(**tokens).last_hidden_state[0].mean(dim=0))
    except Exception as error:  # those of transformers, tokenizers, the hub and safetensors
        raise UserError(
            f"text_encoder is {encoder!r}: not a text model of transformers, on the Hugging Face hub or in a folder "
            f"({type(error).__name__}: {(str(error).splitlines() or [''])[0]})"
        ) from error
    return torch.stack(vectors)
