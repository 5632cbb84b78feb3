"""MDNet: networks that read a medical image, write its report and show where they looked.

Importing this package does nothing: every heavy dependency is imported by the one file that uses it.
"""

__version__ = "0.1.0"
