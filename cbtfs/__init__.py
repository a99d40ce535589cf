"""cbtfs: the disks of a Xen pool as files, and incremental backups of them that are files too."""

__version__ = "0.1.0"
