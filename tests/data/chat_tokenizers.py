"""Small byte-level tokenizers with chat templates in the forms in which they were released."""

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from qscope_jax.data.chat_data import Message

# Qwen3's: a thought is kept in the answers after the last question alone, and the last of these always has one. Without its tools.
QWEN3 = r"""{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and (loop.last or reasoning_content) %}
            {{- '<|im_start|>' + message.role + '\n<think>\n' + reasoning_content.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}"""

# As Qwen's thinking models have it: the generation prompt opens the thought.
QWEN3_THINKING = QWEN3.replace(
    r"""    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
""",
    r"""    {{- '<think>\n' }}
""",
)

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)

LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

# Answers follow questions at once, with no generation prompt.
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] | trim + eos_token}}{% endif %}{% endfor %}"
)

# Writes answers' headers, but has no generation prompt.
HEADERS_ALONE = CHATML.split("{% if add")[0]

# Special tokens, in the order of their ids from 0, and what they are for.
SPECIALS = {
    "qwen": {"<|endoftext|>": "pad_token", "<|im_start|>": "", "<|im_end|>": "eos_token"},
    "gemma": {"<pad>": "pad_token", "<eos>": "eos_token", "<bos>": "bos_token", "<start_of_turn>": "", "<end_of_turn>": ""},
    "llama": {"<|begin_of_text|>": "bos_token", "<|eot_id|>": "eos_token", "<|start_header_id|>": "", "<|end_header_id|>": ""},
    "mistral": {"<s>": "bos_token", "</s>": "eos_token", "[INST]": "", "[/INST]": ""},
}

_WORDS = ["user assistant model system answer question Four Six four six What is the and the answer is the question is"] * 3


def make_tokenizer(family: str, template: str | None = None, *, trim_offsets: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer that adds the family's token for the beginning, if it has one, and merges the bytes of some English words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = SPECIALS[family]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=list(specials), initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_WORDS, trainer)
    roles = {role: token for token, role in specials.items() if role}
    adds = [processors.ByteLevel(trim_offsets=trim_offsets)]
    if begin := roles.get("bos_token"):
        adds.append(processors.TemplateProcessing(single=f"{begin} $A", special_tokens=[(begin, tokenizer.token_to_id(begin))]))
    tokenizer.post_processor = processors.Sequence(adds)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **roles)


def turns(*texts: str, system: str = "") -> tuple[Message, ...]:
    """Questions and answers in turn, after a system text if there is one."""
    first = (Message("system", system),) if system else ()
    return first + tuple(Message(("user", "assistant")[place % 2], text) for place, text in enumerate(texts))
