"""Triton's interpreter, quicker: on small tensors nearly all of its time goes into what it does again and again."""

import dataclasses
import sys


def quicken():
    """Has the interpreter, where it is loaded, prepare the language once, and remember types.

    By itself it looks through all of ``triton.language`` at every launch, again at every call of a device function, and
    takes everything back at the end; nothing in such a process compiles, so nothing asks for the originals. And every
    value of a kernel makes its type anew, and a table of all types to find numpy's.
    """
    interpreter = sys.modules.get("triton.runtime.interpreter")
    if interpreter is None or hasattr(interpreter._patch_lang, "patched"):
        return
    patch, nothing = interpreter._patch_lang, interpreter._LangPatchScope()

    def patch_once(fn):
        visible = {name for name in ("tl", "core") if fn.__globals__.get(name) is not None}
        if not visible or visible - patch_once.patched:
            patch(fn)
            patch_once.patched |= visible
        return nothing

    patch_once.patched = set()
    interpreter._patch_lang = patch_once
    numpy_of, types = interpreter._get_np_dtype, {}

    def numpy_of_name(kind):
        name = kind.scalar.name  # a block is stored as its elements
        if name not in types:
            types[name] = numpy_of(kind)
        return types[name]

    interpreter._get_np_dtype = numpy_of_name
    core = interpreter.tl.core
    type_of, shapes = core._type_for_tuple_values, {}

    def type_of_shape(values, fields=None):
        if fields or not all(type(x) is core.constexpr and type(x.value) is int for x in values):
            return type_of(values, fields)
        key = tuple(x.value for x in values)
        if key not in shapes:
            shapes[key] = type_of(values)
        return shapes[key]

    core._type_for_tuple_values = type_of_shape
    builder = interpreter.interpreter_builder
    keep_blocks(core, builder)
    # By itself it works out whether each sum and product of integers overflows, and asserts it under ``debug`` alone.
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=builder.options.debug)


def keep_blocks(core, builder):
    """Has types of blocks made once for a shape and an element, and their sizes once, not for every value."""
    make, scalar = core.block_type.with_element_ty, (core.constexpr(1), core.tuple([]))
    stored = core.block_type.to_ir

    def with_element_ty(self, element):
        if not hasattr(self, "alike"):
            self.alike = {self.element_ty.name: self}
        if element.name not in self.alike:
            made = self.alike[element.name] = make(self, element)
            made.alike = self.alike
        return self.alike[element.name]

    def sizes(kind):
        if not kind.is_block():
            return scalar
        if not hasattr(kind, "sizes"):
            kind.sizes = core.constexpr(kind.numel), core.tuple([core.constexpr(n) for n in kind.shape])
        return kind.sizes

    def hold(self, handle, kind):
        self.handle, self.type, self.dtype = handle, kind, kind.scalar
        self.numel, self.shape = sizes(kind)

    core.block_type.with_element_ty = with_element_ty
    # What the interpreter stores blocks as is a type that equals theirs.
    core.block_type.to_ir = lambda self, other: self if other is builder else stored(self, other)
    core.tensor.__init__ = hold
