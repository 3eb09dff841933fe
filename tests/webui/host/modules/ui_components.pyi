import gradio as gr

class InputAccordion(gr.Checkbox):
    """A checkbox that is shown as an accordion: open means on."""

    def __init__(self, value, **kwargs):
        name = kwargs.get("elem_id")
        super().__init__(value, label=kwargs.get("label"), elem_id=f"{name}-checkbox", visible=False)
        self.accordion = gr.Accordion(label=kwargs.get("label", "Accordion"), elem_id=name, elem_classes=["input-accordion"], open=value)

    def __enter__(self):
        self.accordion.__enter__()
        return self

    def __exit__(self, *error):
        self.accordion.__exit__(*error)

    def get_block_name(self):
        return "checkbox"

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
