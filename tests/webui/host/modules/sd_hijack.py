class StableDiffusionModelHijack:
    def get_prompt_lengths(self, text):
        from . import prompt_parser

        count = len(prompt_parser.words(text))
        return count, 75 * max(1, -(-count // 75))


model_hijack = StableDiffusionModelHijack()
