"""langchain-openai's ChatOpenAI, unchanged."""

from __future__ import annotations

from typing import Any

import pytest

from tests.clients.contract import Answer, Client, ClientContract, Errors, Question

langchain_openai = pytest.importorskip("langchain_openai")


class LangChain(Client):
    """A model made for each question, as LangChain's hold their parameters."""

    def ask(self, question: Question) -> Answer:
        return self._answer(self._model(question).invoke(question.content))

    def stream(self, question: Question) -> Answer:
        chunks = iter(self._model(question).stream(question.content))
        joined = next(chunks)
        for chunk in chunks:
            joined += chunk  # chunks add up, by LangChain's own rules
        return self._answer(joined)

    def leave(self, question: Question) -> str:
        chunks = self._model(question).stream(question.content)
        text: str = next(chunk.content for chunk in chunks if chunk.content)
        chunks.close()
        return text

    def _model(self, question: Question) -> Any:
        return langchain_openai.ChatOpenAI(
            base_url=f"{question.url}/v1",
            api_key=question.key,
            model=question.model,
            max_tokens=question.max_tokens,
            temperature=question.temperature,
            max_retries=0,
            stream_usage=True,
        )

    def _answer(self, message: Any) -> Answer:
        usage = message.usage_metadata
        return Answer(
            text=message.content,
            finish_reason=message.response_metadata["finish_reason"],
            prompt_tokens=usage["input_tokens"],
            completion_tokens=usage["output_tokens"],
        )


@pytest.fixture(scope="module")
def client() -> LangChain:
    return LangChain()


class TestLangChain(ClientContract):
    errors = Errors(
        bad_field="OpenAIInvalidRequestError",
        wrong_key="OpenAIAuthenticationError",
        no_such_model="OpenAIModelNotFoundError",
        overloaded="OpenAIRateLimitError",
        midway="APIError",
    )
