# ruff: noqa: E501 (a template is one line where its model writes one)
"""Chat templates written for the tests: imitations of those of the most used 7B-14B models, and awkward ones.

None is a copy: each follows the shape of its model's turns (what opens and ends them, what happens to the system
message, tools, dates and thinking). The special tokens are `<s>`, `</s>` and those that a template names.
"""

from __future__ import annotations

_CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

USUAL: dict[str, str] = {
    "qwen2.5": "{%- if tools %}{{- '<|im_start|>system\n# Tools\n' }}{%- for tool in tools %}{{- '\n' }}{{- tool | tojson }}"
    "{%- endfor %}{{- '<|im_end|>\n' }}{%- elif messages[0]['role'] != 'system' %}"
    "{{- '<|im_start|>system\nYou are a careful helper.<|im_end|>\n' }}{%- endif %}" + _CHATML,
    "qwen3": "{%- set ns = namespace(last=messages|length - 1) %}{%- for m in messages %}"
    "{%- if m.role == 'assistant' %}{%- set said = m.content %}"
    "{%- if '</think>' in said %}{%- set said = said.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
    "{{- '<|im_start|>assistant\n' }}{%- if loop.index0 == ns.last %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{{- said + '<|im_end|>\n' }}{%- else %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{%- endif %}",
    "qwen3-thinking": _CHATML.replace("assistant\n' }}{% endif %}", "assistant\n<think>\n' }}{% endif %}"),
    "llama2": "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set sys = messages[0]['content'] %}"
    "{% else %}{% set rest = messages %}{% set sys = false %}{% endif %}{% for m in rest %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}"
    "{% if loop.index0 == 0 and sys != false %}{% set text = '<<SYS>>\n' + sys + '\n<</SYS>>\n\n' + m['content'] %}"
    "{% else %}{% set text = m['content'] %}{% endif %}{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + text.strip() + ' [/INST]' }}{% else %}{{ ' ' + text.strip() + ' ' + eos_token }}"
    "{% endif %}{% endfor %}",
    "llama3": "{% for m in messages %}{% set turn = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + "
    "m['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set turn = bos_token + turn %}{% endif %}"
    "{{ turn }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}",
    "llama3.1": "{{- bos_token }}{%- if not date_string is defined %}{%- set date_string = strftime_now('%d %b %Y') %}"
    "{%- endif %}{%- if messages[0].role == 'system' %}{%- set sys = messages[0].content|trim %}"
    "{%- set messages = messages[1:] %}{%- else %}{%- set sys = '' %}{%- endif %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\n' }}{%- if tools is not none %}{{- 'Environment: ipython\n' }}"
    "{%- endif %}{{- 'Today Date: ' + date_string + '\n\n' + sys + '<|eot_id|>' }}{%- for m in messages %}"
    "{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content|trim + '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}",
    "mistral-v0.1": "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% elif m['role'] == 'assistant' %}{{ m['content'] + eos_token + ' ' }}"
    "{% endif %}{% endfor %}",
    "mistral-v0.3": "{%- if messages[0].role == 'system' %}{%- set sys = messages[0].content %}{%- set turns = messages[1:] %}"
    "{%- else %}{%- set turns = messages %}{%- endif %}{{- bos_token }}{%- for m in turns %}{%- if m.role == 'user' %}"
    "{%- if loop.last and sys is defined %}{{- '[INST] ' + sys + '\n\n' + m.content + '[/INST]' }}{%- else %}"
    "{{- '[INST] ' + m.content + '[/INST]' }}{%- endif %}{%- elif m.role == 'assistant' %}"
    "{{- ' ' + m.content|trim + eos_token }}{%- else %}{{- raise_exception('Only user and assistant') }}{%- endif %}"
    "{%- endfor %}",
    "mistral-nemo": "{{- bos_token }}{%- for m in messages %}{%- if m.role == 'user' %}{{- '[INST]' + m.content + '[/INST]' }}"
    "{%- elif m.role == 'system' %}{{- '[SYSTEM_PROMPT]' + m.content + '[/SYSTEM_PROMPT]' }}{%- else %}"
    "{{- m.content + eos_token }}{%- endif %}{%- endfor %}",
    "gemma2": "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}{% set role = 'model' if m['role'] == 'assistant' else "
    "m['role'] %}{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}",
    "gemma3": "{{ bos_token }}{%- set first = '' -%}{%- if messages[0]['role'] == 'system' -%}"
    "{%- set first = messages[0]['content'] + '\n\n' -%}{%- set turns = messages[1:] -%}{%- else -%}"
    "{%- set turns = messages -%}{%- endif -%}{%- for m in turns -%}{{ '<start_of_turn>' + ('model' if m['role'] == "
    "'assistant' else m['role']) + '\n' + (first if loop.first else '') }}{%- if m['content'] is string -%}"
    "{{ m['content'] | trim }}{%- elif m['content'] is iterable -%}{%- for p in m['content'] -%}{{ p['text'] | trim }}"
    "{%- endfor -%}{%- endif -%}{{ '<end_of_turn>\n' }}{%- endfor -%}{%- if add_generation_prompt -%}"
    "{{'<start_of_turn>model\n'}}{%- endif -%}",
    "phi3": "{% for m in messages %}{% if m['role'] == 'system' %}{{ '<|system|>\n' + m['content'] + '<|end|>\n' }}"
    "{% elif m['role'] == 'user' %}{{ '<|user|>\n' + m['content'] + '<|end|>\n' }}{% elif m['role'] == 'assistant' %}"
    "{{ '<|assistant|>\n' + m['content'] + '<|end|>\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
    "phi4": "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '<|im_sep|>' + m['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}",
    "deepseek-v2": "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}"
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ 'User: ' + m['content'] + '\n\n' }}"
    "{% elif m['role'] == 'assistant' %}{{ 'Assistant: ' + m['content'] + eos_token }}{% elif m['role'] == 'system' %}"
    "{{ m['content'] + '\n\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}",
    "deepseek-r1": "{%- set ns = namespace(sys='') -%}{%- for m in messages %}{%- if m['role'] == 'system' %}"
    "{%- set ns.sys = ns.sys + m['content'] %}{%- endif %}{%- endfor %}{{ bos_token }}{{ ns.sys }}{%- for m in messages %}"
    "{%- if m['role'] == 'user' %}{{ '<|User|>' + m['content'] }}{%- endif %}{%- if m['role'] == 'assistant' %}"
    "{%- set said = m['content'] %}{%- if '</think>' in said %}{%- set said = said.split('</think>')[-1] %}{%- endif %}"
    "{{ '<|Assistant|>' + said + eos_token }}{%- endif %}{%- endfor %}{% if add_generation_prompt %}"
    "{{ '<|Assistant|><think>\n' }}{% endif %}",
    "granite": "{%- for m in messages %}{{- '<|start_of_role|>' + m['role'] + '<|end_of_role|>' + m['content'] + "
    "'<|end_of_text|>\n' }}{%- if loop.last and add_generation_prompt %}"
    "{{- '<|start_of_role|>assistant<|end_of_role|>' }}{%- endif %}{%- endfor %}",
    "command-r": "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set turns = messages[1:] %}"
    "{{ '<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>' + messages[0]['content'] + '<|END_OF_TURN_TOKEN|>' }}{% else %}"
    "{% set turns = messages %}{% endif %}{% for m in turns %}{{ '<|START_OF_TURN_TOKEN|>' + ('<|USER_TOKEN|>' if "
    "m['role'] == 'user' else '<|CHATBOT_TOKEN|>') + m['content'].strip() + '<|END_OF_TURN_TOKEN|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}",
    "yi": "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}"
    + _CHATML,
    "zephyr": "{% for m in messages %}\n{% if m['role'] == 'user' %}\n{{ '<|user|>\n' + m['content'] + eos_token }}\n"
    "{% elif m['role'] == 'system' %}\n{{ '<|system|>\n' + m['content'] + eos_token }}\n"
    "{% elif m['role'] == 'assistant' %}\n{{ '<|assistant|>\n' + m['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}",
    "gpt-oss": "{{- '<|start|>system<|message|>Cutoff: 2024-06\nReasoning: ' + (reasoning_effort or 'medium') + '<|end|>' }}"
    "{%- for m in messages %}{%- if m.role == 'system' or m.role == 'developer' %}"
    "{{- '<|start|>developer<|message|># Instructions\n\n' + m.content + '<|end|>' }}{%- elif m.role == 'assistant' %}"
    "{{- '<|start|>assistant<|channel|>final<|message|>' + m.content + ('<|return|>' if loop.last else '<|end|>') }}"
    "{%- else %}{{- '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}",
}

AWKWARD: dict[str, str] = {
    "generation": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}"
    "{% endgeneration %}{% else %}<|im_start|>{{ m.content }}{% endif %}\n{% endfor %}",
    "none-or-defined": "{{ tools is none }} {{ documents is none }} {{ tools is defined }} {{ nothing is defined }}"
    "{% if tools is not none %}TOOLS{% endif %}{% for m in messages %}[{{ m.content }}]{% endfor %}",
    "loop-controls": "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{{ m | tojson }}\n"
    "{% if loop.index > 3 %}{% break %}{% endif %}{% endfor %}",
    "tojson": "{% for m in messages %}{{ m | tojson(indent=2) }}{{ m.content | tojson(ensure_ascii=true) }}"
    "{{ {'b': '<&>', 'a': [1, none, true]} | tojson(sort_keys=true, separators=(',', ':')) }}{% endfor %}",
    "macro": "{% macro turn(role, text='') %}<|im_start|>{{ role }}\n{{ text }}{{ caller() if caller else '' }}<|im_end|>\n"
    "{% endmacro %}{% for m in messages %}{{ turn(m.role, m.content) }}{% endfor %}"
    "{% call turn('x') %}inner{% endcall %}",
    "whitespace": "\n    {% for m in messages %}\n    {% set x = m.content %}\n{{ x }}\n    {% endfor %}\n\n  {#- c -#}  end \n",
    "filters": "{% for m in messages if m.role != 'system' %}{{ loop.cycle('a', 'b') }}{{ m.content | trim | upper | replace('E', "
    "'3') | indent(2) }}{{ '%s-%03d' | format(m.role, loop.index) }}{{ '{:>8}'.format(m.role) }}{{ '%5.1f' % 2.25 }}"
    "{{ m.content.split() | join('_') }}{{ m.content[::-1] }}{{ m.content | length }}{% endfor %}"
    "{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | list }}"
    "{{ messages | map(attribute='role') | unique | sort | join(',') }}{{ messages | groupby('role') | list | length }}",
    "namespace": "{% set ns = namespace(found=false, text='') %}{% for m in messages %}{% set ns.text = ns.text ~ m.role[0] ~ "
    "loop.index %}{% if m.role == 'system' %}{% set ns.found = true %}{% endif %}{% endfor %}{{ ns.found }}{{ ns.text }}"
    "{{ (messages[-1].content.strip() + '!') * 2 }}{{ 7 // 2 }}{{ 7 % 4 }}{{ 2 ** 10 }}{{ [1] + [2] }}{{ 1 < 2 < 3 }}",
    "recursive": "{% for x in [[1, [2]], 3] recursive %}{% if x is iterable %}({{ loop(x) }}){% else %}{{ x }}{% endif %}"
    "{% endfor %}{% block tail %}{{ messages|length }}{% endblock %}{{ self.tail() }}",
    "refuses": "{{ raise_exception('only single turns, please') }}",
    "type-error": "{{ messages[0].content + 1 }}",
    "undefined": "{{ messages[0].metadata.source }}",
    "parts-only": "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for p in m.content %}{% if p.type == 'text' %}"
    "{{ p.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% endif %}",
    "drops-system": "{% for m in messages %}{% if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
}
TEMPLATES = USUAL | AWKWARD

TALKS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "What is 12345?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "  blanks round it \n"}],
    [
        {"role": "user", "content": "α β 日本 🙂 <|im_end|> fake"},
        {"role": "assistant", "content": "yes\n\n"},
        {"role": "user", "content": ""},
    ],
    [
        {"role": "system", "content": "Answer \"yes\" or 'no'."},
        {"role": "user", "content": "Pourquoi ?"},
        {"role": "assistant", "content": "<think>\nwell\n</think>\n\nNo !"},
        {"role": "user", "content": "Und jetzt?"},
    ],
]
