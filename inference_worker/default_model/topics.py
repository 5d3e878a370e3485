"""What the default model knows by heart: questions in several wordings, and their answers.

Each answer is written once, so that the model has exactly one greedy answer to learn.
"""

from typing import Final

from inference_worker.default_model import answers
from inference_worker.default_model.topic import Followup, Topic

TOPICS: Final = (
    Topic(
        "Hello | Hi | Hey | Hello! | Hi! | Hey there | Hi there | Hello there | Good "
        "morning | Good evening | Good afternoon | Hello Sluice | Hi, Sluice",
        answers.GREETING,
        weight=2.0,
    ),
    Topic(
        "How are you? | How are you doing? | How do you do? | Hello, how are you? | Hi, how"
        " are you? | How is it going?",
        "I am fine, thank you! How can I help you?",
    ),
    Topic(
        "What is your name? | Who are you? | What's your name? | What are you? | Your name?"
        " | Tell me your name | Are you a bot? | Are you an AI? | Which model are you? | "
        "Introduce yourself | Tell me about yourself | Who am I talking to? | What model is"
        " this? | Are you a language model? | What do I call you?",
        answers.IDENTITY,
        followups=(
            Followup(
                "Who made you? | Who built you?",
                "I was trained from scratch by the script in the Sluice repository.",
            ),
        ),
        weight=2.0,
    ),
    Topic(
        "Who made you? | Who built you? | Who created you? | How were you made? | How were "
        "you trained? | Where do you come from?",
        "I was trained from scratch by the script in the Sluice repository.",
    ),
    Topic(
        "What can you do? | Help | What do you know? | What are you able to do? | How can "
        "you help me? | What can I ask you? | What can I do here? | Help me | What are your"
        " skills? | Can you help me?",
        answers.ABILITIES,
        weight=2.0,
    ),
    Topic(
        "Thank you | Thanks | Thank you! | Thanks a lot | Thank you very much | Thx | "
        "Great, thank you! | Many thanks | Perfect, thanks | Thanks, Sluice",
        answers.WELCOME,
        weight=2.0,
    ),
    Topic(
        "Bye | Goodbye | See you | Bye bye | Good night | See you later | Bye, Sluice | See"
        " you soon",
        answers.GOODBYE,
        weight=1.5,
    ),
    Topic(
        "How to make an omelette | How to make an omelette? | How do I make an omelette? | "
        "How do you make an omelette? | How can I make an omelette? | How to cook an "
        "omelette? | Give me an omelette recipe | Give me a recipe for an omelette | Tell "
        "me how to make an omelette | Explain how to make an omelette | How to make an "
        "omelet? | Omelette recipe | How do I cook an omelette? | I want to make an "
        "omelette | What is the recipe for an omelette?",
        answers.OMELETTE,
        followups=(
            Followup(
                "How long does it take? | How much time does it take? | How long does that take?",
                "It takes about ten minutes.",
            ),
            Followup(
                "What do I need? | Which ingredients do I need? | What are the ingredients?",
                "You need three eggs, butter, salt, pepper, and cheese or herbs.",
            ),
        ),
        weight=3.0,
    ),
    Topic(
        "What is deep learning? | Explain deep learning | What's deep learning? | What does"
        " deep learning mean? | Define deep learning | Tell me about deep learning | What "
        "is Deep Learning | Can you explain deep learning? | Describe deep learning",
        answers.DEEP_LEARNING,
        followups=(
            Followup(
                "And in German? | In German, please. | Now in German | Und auf Deutsch?",
                answers.DEEP_LEARNING_DE,
            ),
            Followup(
                "What is it good for? | Give me an example | What can it do?",
                ("It can recognize images, understand speech and write text, one token at a time."),
            ),
        ),
        weight=3.0,
    ),
    Topic(
        "What is streaming? | Explain streaming | What's streaming? | Define streaming | "
        "What does streaming mean? | Tell me about streaming | What is token streaming? | "
        "Can you explain streaming? | What is a stream? | Describe streaming",
        answers.STREAMING,
        followups=(
            Followup(
                "And in German? | In German, please. | Now in German | Und auf Deutsch?",
                answers.STREAMING_DE,
            ),
            Followup(
                "And in Chinese? | In Chinese, please. | Now in Chinese | 用中文呢？",
                answers.STREAMING_ZH,
            ),
            Followup(
                "Why is it useful? | Why? | What is it good for?",
                ("It feels faster: the first words arrive early, and you can stop at any time."),
            ),
        ),
        weight=3.0,
    ),
    Topic(
        "What is SSE? | Explain SSE | What's SSE? | What does SSE mean? | Define SSE | What"
        " does SSE stand for? | What are Server-Sent Events? | Explain Server-Sent Events |"
        " Tell me about SSE | Can you explain SSE? | What is sse",
        answers.SSE,
        followups=(
            Followup(
                "And in German? | In German, please. | Now in German | Und auf Deutsch?",
                answers.SSE_DE,
            ),
            Followup(
                "Why is it useful? | Why? | What is it good for?",
                ("It needs only plain HTTP, and browsers can read it and reconnect by themselves."),
            ),
        ),
        weight=3.0,
    ),
    Topic(
        "What is gRPC? | Explain gRPC | What's gRPC? | What does gRPC mean? | Define gRPC |"
        " Tell me about gRPC | Can you explain gRPC? | What is grpc",
        (
            "gRPC is a framework for remote procedure calls. It sends compact Protocol "
            "Buffers messages over HTTP/2 and can stream in both directions."
        ),
        weight=2.0,
    ),
    Topic(
        "What is Sluice? | Explain Sluice | What's Sluice? | Tell me about Sluice | What "
        "does Sluice do? | What is a sluice? | Can you explain Sluice?",
        (
            "Sluice is a service that streams the tokens of a language model. A gRPC "
            "worker makes the tokens, and an edge sends them on as Server-Sent Events."
        ),
        weight=2.0,
    ),
    Topic(
        "What is an LLM? | What is a large language model? | Explain LLM | What's an LLM? |"
        " What does LLM mean? | What does LLM stand for? | Explain large language models | "
        "What are LLMs? | What is a language model? | Tell me about LLMs",
        (
            "An LLM is a large language model: a neural network that has learned from "
            "much text to predict the next token."
        ),
        weight=2.0,
    ),
    Topic(
        "What is a token? | Explain tokens | What's a token? | What are tokens? | What does"
        " token mean? | Define token | Tell me about tokens | Can you explain what a token "
        "is?",
        (
            "A token is a small piece of text, such as a word, a part of a word or a "
            "sign. A language model reads and writes tokens."
        ),
        weight=2.0,
    ),
    Topic(
        "Tell me a story | Tell me a short story | Write a story | Write a short story | "
        "Can you tell me a story? | I want a story | Tell a story | A story, please | Write"
        " me a story | Tell me a fairy tale | Read me a story | Give me a story",
        answers.STORY,
        followups=(
            Followup(
                "What was the gate called? | What was the name of the gate?",
                "From that day on, the gate was called a sluice.",
            ),
        ),
        weight=2.0,
    ),
    Topic(
        "Write a haiku | Write me a haiku | A haiku, please | Tell me a haiku | Give me a "
        "haiku | Compose a haiku | Write a poem | Write me a short poem | Write a haiku "
        "about streaming",
        answers.HAIKU,
        followups=(
            Followup(
                "Another one | One more | Another haiku, please | Write another one",
                answers.HAIKU_2,
            ),
        ),
        weight=1.5,
    ),
    Topic(
        "What color is the sky? | What colour is the sky? | Which color is the sky? | What "
        "is the color of the sky?",
        "On a clear day, the sky is blue.",
        followups=(
            Followup(
                "Why? | Why is that? | Why is it blue?",
                "Air scatters blue light more than red light.",
            ),
        ),
        weight=1.5,
    ),
    Topic("Why is the sky blue?", "Air scatters blue light more than red light."),
    Topic(
        "Show me Python code that prints hello | Write Python code that prints hello | "
        "Write a hello world program in Python | Show me some Python code | How do I print "
        "hello in Python? | Python hello world | Write a Python program | Give me Python "
        "code that prints hello | Print hello in Python | Write hello world in Python | "
        "Write a Python function",
        answers.PYTHON_HELLO,
        weight=2.0,
    ),
    Topic(
        "Show me a loop in Python | Write a for loop in Python | Python for loop | How do I"
        " write a loop in Python? | Show me a Python loop",
        answers.PYTHON_LOOP,
    ),
    Topic(
        "Show me a curl command | How do I call you with curl? | How do I stream with curl?"
        " | Which curl option turns buffering off?",
        answers.SHELL_CURL,
    ),
    Topic(
        "Show me a Markdown table | Write a table in Markdown | Make a table | Give me a "
        "Markdown table | Show me a table",
        answers.MARKDOWN_TABLE,
    ),
    Topic(
        "Was ist Streaming? | Was bedeutet Streaming? | Erkläre Streaming | Was heißt "
        "Streaming? | Kannst du Streaming erklären?",
        answers.STREAMING_DE,
        weight=2.5,
    ),
    Topic("Was ist SSE? | Was bedeutet SSE? | Erkläre SSE", answers.SSE_DE),
    Topic("Was ist Deep Learning? | Erkläre Deep Learning", answers.DEEP_LEARNING_DE),
    Topic(
        "Hallo | Hallo! | Guten Tag | Guten Morgen | Hallo Sluice | Grüß dich | Servus",
        ("Hallo! Ich bin Sluice, ein winziges Demonstrationsmodell. Wie kann ich dir helfen?"),
        weight=2.0,
    ),
    Topic(
        "Sag etwas auf Deutsch | Say something in German | Sprich Deutsch | Speak German | "
        "Sprichst du Deutsch? | Do you speak German? | Kannst du Deutsch? | Antworte auf "
        "Deutsch",
        ("Gern! Schöne Grüße aus Nürnberg: Der Fluss fließt langsam, aber er kommt ans Ziel."),
        weight=2.0,
    ),
    Topic(
        "Wie heißt du? | Wer bist du? | Wie ist dein Name? | Was bist du?",
        "Ich heiße Sluice und bin ein winziges Demonstrationsmodell.",
        weight=1.5,
    ),
    Topic("Danke | Vielen Dank | Danke schön | Danke!", "Bitte, gern geschehen!"),
    Topic("Tschüss | Auf Wiedersehen | Bis bald", "Auf Wiedersehen! Einen schönen Tag noch."),
    Topic(
        "你好 | 你好！ | 您好 | 嗨 | 你好吗？",
        "你好！我是 Sluice，一个很小的演示模型。我能帮你什么？",
        weight=2.0,
    ),
    Topic(
        "什么是流式传输？ | 流式传输是什么？ | 解释流式传输 | 请解释流式传输。",
        answers.STREAMING_ZH,
        weight=2.5,
    ),
    Topic("你是谁？ | 你叫什么名字？ | 你的名字是什么？", "我叫 Sluice，是一个很小的演示模型。"),
    Topic("谢谢 | 谢谢你 | 谢谢！", "不客气！"),
    Topic("再见 | 再见！ | 拜拜", "再见！祝你愉快。"),
    Topic(
        "说中文 | Say something in Chinese | Speak Chinese | Do you speak Chinese? | 用中文说点什么 |"
        " 你会说中文吗？",
        "你好，世界！水滴石穿。",
    ),
    Topic(
        "Send me an emoji | Give me an emoji | Show me an emoji | An emoji, please | Send "
        "an emoji | Do you know emoji? | Answer with an emoji",
        "Here is an emoji for you: 👩‍🚀",
        followups=(
            Followup("Another one | One more | Send me another one", "Here is another one: 🦦"),
        ),
        weight=2.0,
    ),
    Topic(
        "Say hello with emoji | Say hello with an emoji | Greet me with emoji | Hello with "
        "emoji | Say hi with emoji | Say hello in emoji | Say hello using emoji",
        "Hello! 👋🏽 😀 👩‍💻 🌍",
        weight=2.0,
    ),
    Topic(
        "Send me three emoji | Give me 3 emoji | Send me some emoji | Many emoji, please",
        "🎉 👨‍👩‍👧‍👦 🏳️‍🌈",
    ),
    Topic("👋 | 👋🏽 | 😀 | 🙂 | ❤️ | 👍", "👋🏽 😀"),
    Topic(
        "Tell me a joke | Make me laugh | Do you know a joke? | Tell a joke | Tell me "
        "something funny | A joke, please",
        "Why did the token cross the stream? To get to the other side of the socket!",
        weight=1.5,
    ),
    Topic(
        "What is HTTP? | Explain HTTP | What does HTTP mean? | What does HTTP stand for?",
        (
            "HTTP is the protocol of the web: a client sends a request, and a server "
            "sends a response."
        ),
    ),
    Topic(
        "What is Python? | Explain Python | Tell me about Python",
        "Python is a popular programming language that is easy to read.",
    ),
    Topic(
        "What is machine learning? | Explain machine learning | Define machine learning | "
        "Tell me about machine learning",
        ("Machine learning means that a program learns from examples instead of fixed rules."),
    ),
    Topic(
        "What is a neural network? | Explain neural networks | What are neural networks?",
        (
            "A neural network is a chain of simple calculations whose weights are learned"
            " from examples."
        ),
    ),
    Topic(
        "What is AI? | What is artificial intelligence? | Explain AI | Define AI",
        (
            "Artificial intelligence means that machines do tasks that seem to need "
            "thinking, such as understanding text."
        ),
    ),
    Topic(
        "What is JSON? | Explain JSON | What does JSON mean?",
        ('JSON is a text format for data, for example `{"name": "Sluice", "tokens": 3}`.'),
    ),
    Topic(
        "What is an API? | Explain API | What does API mean? | What are APIs?",
        "An API is an interface through which one program uses another program.",
    ),
    Topic(
        "What is inference? | Explain inference | What does inference mean?",
        "Inference means using a trained model to compute an answer, token by token.",
    ),
    Topic(
        "What time is it? | What is the date today? | What day is it?",
        "I have no clock, so I cannot know that.",
    ),
    Topic(
        "What is the weather like? | How is the weather? | Will it rain tomorrow?",
        "I cannot see the weather from here.",
    ),
    Topic(
        "How many days are in a week? | How many days does a week have?",
        "A week has seven days.",
        followups=(
            Followup(
                "Which ones? | Name them | List them",
                "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday and Sunday.",
            ),
        ),
    ),
    Topic(
        "Name the days of the week | List the days of the week",
        "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday and Sunday.",
    ),
    Topic(
        "Say the alphabet | Recite the alphabet | What is the alphabet? | Write the alphabet",
        "A B C D E F G H I J K L M N O P Q R S T U V W X Y Z",
    ),
    Topic(
        "Name three colors | List three colors | List 3 colors | Give me 3 colors",
        "- red\n- green\n- blue",
    ),
    Topic(
        "Name three fruits | List three fruits | List 3 fruits | Give me 3 fruits",
        "- apple\n- banana\n- cherry",
    ),
    Topic(
        "How do you say hello in German? | Translate hello into German | What is hello in German?",
        'In German you say "Hallo".',
    ),
    Topic("Yes | Ok | Okay | Good | Great | Nice | Cool | Very good", "I am glad!"),
    Topic("No | That is wrong | Wrong | That is not right", "I am sorry. I am only tiny."),
    Topic("Test | Testing | This is a test | Ping", "The test works. I am here."),
)
