"""A square in which a rectangle is dragged to the size that is wanted."""

from typing import Any

import gradio as gr

BOX = """<div class="field" title="drag to choose a size"><div class="picture" style="
  height: ${100 * value[0] / most}%; width: ${100 * value[1] / most}%">${value[0]}x${value[1]}</div></div>"""
LOOK = """
.field {width: 152px; height: 152px; border: 1px dashed #bbb; cursor: crosshair; touch-action: none}
.picture {background: #ff9e4a66; border: 1px solid #f27b13; box-sizing: border-box; padding: 1px 3px;
  font-size: 11px; pointer-events: none; white-space: nowrap}
"""
DRAG = """
let held = false;
const choose = event => {
  const field = element.querySelector('.field').getBoundingClientRect();
  const pixels = (at, from, length) => {
    const side = Math.min(1, Math.max(0, (at - from) / length)) * props.most;
    return Math.max(props.step, Math.round(side / props.step) * props.step);
  };
  props.value = [pixels(event.clientY, field.top, field.height),
                 pixels(event.clientX, field.left, field.width)];
  trigger('input');
};
element.addEventListener('pointerdown', event => {
  held = !!event.target.closest('.field');
  if (held) choose(event);
});
window.addEventListener('pointermove', event => { if (held) choose(event); });
window.addEventListener('pointerup', () => { held = false; });
"""


def add_size_box(height: Any, width: Any, most: int, step: int) -> Any:
    """A box that moves the sliders `height` and `width`, by `step` to `most` pixels, and follows them."""
    box = gr.HTML(
        [height.value, width.value], html_template=BOX, css_template=LOOK, js_on_load=DRAG, most=most,
        step=step, elem_id="drag", min_width=160,
    )  # fmt: skip
    box.input(
        None, box, [height, width], js="value => value", api_visibility="private", queue=False
    )  # fmt: skip
    for side in (height, width):
        side.change(
            None, [height, width], box, js="(height, width) => [[height, width]]", api_visibility="private",
            queue=False,
        )  # fmt: skip
    return box
