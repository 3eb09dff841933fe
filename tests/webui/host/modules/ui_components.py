import gradio as gr


class InputAccordionImpl(gr.Checkbox):
    """A checkbox that is shown as an accordion: open means on. Gradio 4 makes another of it for every update."""

    def __init__(self, value=None, setup=False, label=None, elem_id=None, visible=True, **kwargs):
        super().__init__(value, label=label, elem_id=f"{elem_id}-checkbox" if setup else elem_id, visible=visible and not setup, **kwargs)
        if setup:
            self.accordion = gr.Accordion(label=label, elem_id=elem_id, elem_classes=["input-accordion"], open=value)

    def __enter__(self):
        self.accordion.__enter__()
        return self

    def __exit__(self, *error):
        self.accordion.__exit__(*error)

    def get_block_name(self):
        return "checkbox"


def InputAccordion(value, **kwargs):
    return InputAccordionImpl(value=value, setup=True, **kwargs)
