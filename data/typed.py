"""Text that is typed while a film is made of it."""

import codecs
import math
import os
import select
import sys
import time

from data.controls import spell
from mutual_forcing import Config, UserError


class TypedText:
    """Standard input as a transcript: a symbol for each frame, as the text comes.

    Raises UserError, as its iterator does, if there is no input, or no letter in it.
    """

    def __init__(self, cfg: Config, interrupted: list):
        """interrupted: the text ends as soon as something is in it."""
        if sys.stdin is None:
            raise UserError("--say -: there is no standard input")
        self.cfg, self.interrupted = cfg, interrupted
        self.waited = 0.0  # seconds spent waiting for text
        self.num_frames = math.inf  # of the film; known when the text has ended

    def __iter__(self):
        """Wait for text and yield its symbols."""
        silence, spoken = self.cfg.silence, False
        decoder = codecs.getincrementaldecoder("utf-8")("ignore")  # a letter may come in two reads
        symbols, num_symbols = [silence] * 2, 0
        while not self.interrupted:
            yield from symbols
            num_symbols, symbols, began = num_symbols + len(symbols), [], time.perf_counter()
            if select.select([sys.stdin], [], [], 0.1)[0]:  # look for an interrupt, too
                text = os.read(sys.stdin.fileno(), 4096)  # one line, if it comes from a terminal
                if not text:
                    break
                symbols = spell(decoder.decode(text))
                spoken = spoken or any(symbol != silence for symbol in symbols)
            self.waited += time.perf_counter() - began
        if not spoken and not self.interrupted:
            raise UserError("--say -: nothing in it can be spoken; letters a to z can")
        self.num_frames = num_symbols + self.cfg.fps // 2

    def cut(self, film):
        """The film of this transcript, until half a second after the end of the text."""
        num_frames = num_samples = 0
        for frames, samples in film:
            if num_frames + len(frames) > self.num_frames:  # the last sound comes with later frames
                end = self.num_frames * self.cfg.sample_rate // self.cfg.fps
                yield frames[: self.num_frames - num_frames], samples[: end - num_samples]
                return
            yield frames, samples
            num_frames, num_samples = num_frames + len(frames), num_samples + len(samples)
