"""The Zephyr conversation format: every turn begins with its role in a line of its own and ends with the EOS token.

Once this file is imported, `data.template: zephyr` selects it for training, and the trained model's processor uses it
for prompts. `load(path, template="zephyr")` prompts a model with it whose own template is not known.
"""

from avg_llava.model.templates import CONTENT_AS_TEXT, TEMPLATES, ConversationTemplate

ZEPHYR = (
    "{%- for message in messages -%}\n"
    + CONTENT_AS_TEXT  # sets `content`
    + """\
  {{- '<|' + message['role'] + '|>\\n' -}}
  {%- if message['role'] == 'assistant' -%}
    {%- generation -%}{{- content + eos_token -}}{%- endgeneration -%}
  {%- else -%}
    {{- content + eos_token -}}
  {%- endif -%}
  {{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- endif -%}
"""
)

TEMPLATES["zephyr"] = ConversationTemplate(ZEPHYR)
"""No `answer_separator`: answers are where `{% generation %}` says."""
