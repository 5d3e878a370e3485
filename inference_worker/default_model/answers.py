"""The longer answers of the default model, and facts that several modules need."""

from typing import Final

FALLBACK: Final = (
    "I am a tiny demonstration model and do not know that. "
    'Try: "Count to 10", "What is streaming?" or "Tell me a story".'
)
GREETING: Final = "Hello! I am Sluice, a tiny demonstration model. How can I help you?"
IDENTITY: Final = "My name is Sluice. I am a tiny demonstration model that streams its answers."
ABILITIES: Final = (
    "I can count, add small numbers, repeat a sentence, tell a story and explain streaming. "
    'Try: "Count to 10" or "What is SSE?".'
)
WELCOME: Final = "You are welcome!"
GOODBYE: Final = "Goodbye! Have a nice day."
STREAMING: Final = (
    "Streaming means sending an answer piece by piece while it is still being made. "
    "You see the first words at once and do not wait for the end."
)
STREAMING_DE: Final = (
    "Streaming heißt, dass eine Antwort Stück für Stück gesendet wird, während sie noch entsteht. "
    "So siehst du die ersten Wörter sofort."
)
STREAMING_ZH: Final = "流式传输是指边生成边发送：答案一段一段地到达，你不必等到全部完成。"
SSE: Final = (
    "SSE stands for Server-Sent Events. It is a simple way for a server to push "
    "text events to a client over one long HTTP response."
)
SSE_DE: Final = (
    "SSE steht für Server-Sent Events: Ein Server sendet dem Client "
    "Ereignisse als Text über eine lange HTTP-Antwort."
)
DEEP_LEARNING: Final = (
    "Deep learning is a kind of machine learning that uses neural networks with many layers. "
    "The network learns useful patterns from examples instead of fixed rules."
)
DEEP_LEARNING_DE: Final = (
    "Deep Learning ist maschinelles Lernen mit neuronalen Netzen aus vielen Schichten, "
    "die Muster aus Beispielen lernen."
)
OMELETTE: Final = (
    "1. Beat three eggs with a pinch of salt and pepper.\n"
    "2. Melt some butter in a hot pan.\n"
    "3. Pour in the eggs and pull the edges to the middle as they set.\n"
    "4. Add cheese or herbs, fold the omelette in half and serve it warm."
)
NUREMBERG_TIPS: Final = (
    "Visit the Imperial Castle and enjoy the view over the old town.",
    "Eat small grilled Nuremberg sausages with sauerkraut near the main market.",
    "See the house of the painter Albrecht Dürer.",
    "Walk along the old city wall.",
    "Come in December for the Christmas market.",
)
STORY: Final = (
    "Once upon a time, there was a small river that wanted to see the sea. "
    "Every day it ran against an old wooden gate, and every day the gate stayed shut. "
    '"Please let me through," said the river. '
    '"If I open at once, you will flood the fields," said the gate. '
    '"Then open a little," said the river, "and I will come drop by drop." '
    "The gate thought about this all night long. "
    "In the morning it lifted itself by the width of one finger. "
    "A thin silver stream ran out, and the children of the village came to watch it. "
    "Drop by drop it passed the mill, the bridge and the green hills. "
    "It never hurried and it never stopped. "
    "After seven days it reached the sea, and the sea was glad to meet it. "
    '"You came slowly," said the sea. '
    '"I came piece by piece," said the river, "and so everybody could see me on the way." '
    "From that day on, the gate was called a sluice, and the river sang as it ran. The end."
)
HAIKU: Final = "Small drops leave the gate,\none by one they find the sea;\nthe words keep flowing."
HAIKU_2: Final = "Snow on the old bridge,\na single crow calls at dawn;\nthe river answers."
PYTHON_HELLO: Final = (
    "Here is a short Python program:\n\n```python\ndef main() -> None:\n"
    '    print("hello")\n\n\nmain()\n```\n\nSave it as `hello.py` and run `python hello.py`.'
)
PYTHON_LOOP: Final = (
    "This loop prints the numbers from 1 to 5:\n\n```python\n"
    "for number in range(1, 6):\n    print(number)\n```"
)
SHELL_CURL: Final = (
    "Use `curl` with `-N`, so that it does not buffer:\n\n"
    "```bash\ncurl -N http://localhost:8000/v1/chat/completions\n```"
)
MARKDOWN_TABLE: Final = (
    "| Word | Meaning |\n| --- | --- |\n| token | a piece of text |\n"
    "| stream | many pieces in order |"
)
NO_NAME: Final = "You have not told me your name yet."

CAPITALS: Final[dict[str, str]] = {
    "France": "Paris",
    "Germany": "Berlin",
    "Japan": "Tokyo",
    "Italy": "Rome",
    "Spain": "Madrid",
    "Austria": "Vienna",
    "Portugal": "Lisbon",
    "Poland": "Warsaw",
    "Greece": "Athens",
    "China": "Beijing",
    "Sweden": "Stockholm",
    "Norway": "Oslo",
    "England": "London",
    "Canada": "Ottawa",
}

PLAIN_TEXTS: Final[tuple[str, ...]] = (
    STORY,
    STREAMING,
    SSE,
    DEEP_LEARNING,
    "The quick brown fox jumps over the lazy dog.",
    "Hello, my name is Sluice. I am a tiny demonstration model that streams its answers.",
    'def main() -> None:\n    print("hello")\n\n\nmain()\n',
    "The capital of France is Paris.",
    "Roses are red, violets are blue, tokens are streamed, and so are you.",
)
