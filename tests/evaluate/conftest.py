from __future__ import annotations

import pytest
import tiny_chat


@pytest.fixture(scope="session")
def tokenizer():
    return tiny_chat.bpe_tokenizer()


@pytest.fixture(scope="session")
def plain_tokenizer():
    return tiny_chat.bpe_tokenizer(None, adds_bos=True)


@pytest.fixture(scope="session")
def inst_tokenizer():
    return tiny_chat.sentencepiece_like_tokenizer()


@pytest.fixture(scope="session")
def model(tokenizer):
    return tiny_chat.llama(len(tokenizer))
