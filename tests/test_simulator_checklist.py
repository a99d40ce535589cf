"""How far the simulated pool behaves as a real one: each line, and the tests that show it.

A client's test means something only if the simulator can fail it as a real pool would. ``A`` is
what would be silent corruption or total failure otherwise, ``B`` the state of protocols, ``C``
robustness.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent

CHECKLIST: dict[str, tuple[str, ...]] = {
    # ── A: changed block tracking, with an oracle of its own ────────────────────────────────
    "A writes set bits in logs that are linked from parent to child": (
        "tracking: test_logs_from_after_the_older_to_with_the_newer_are_ored",
        "guest: test_writes_set_bits_and_discards_do_not",
        "tracking: test_the_pools_own_log_is_there_for_tests",
    ),
    "A from is exclusive, to inclusive": (
        "tracking: test_logs_from_after_the_older_to_with_the_newer_are_ored",
    ),
    "A 460 and 459 with their exact parameters": (
        "tracking: test_the_wrong_way_round_is_unrelated",
        "tracking: test_the_same_vdi_twice_is_the_same",
        "tracking: test_snapshots_of_different_disks_are_unrelated",
        "tracking: test_a_snapshot_from_before_tracking_is_unrelated",
        "tracking: test_growth_too_small_for_a_longer_bitmap_is_inconsistent",
        "tracking: test_a_destroyed_older_end_is_an_invalid_handle",
        "tracking: test_ends_on_different_srs_are_an_internal_error",
    ),
    "A most significant bit first, base64, as long as the newer disk needs": (
        "tracking: test_bitmap_has_the_first_block_in_the_highest_bit",
        "tracking: test_bitmap_is_as_long_as_the_newer_disk_needs",
        "tracking: test_last_partial_block_has_a_bit",
    ),
    "A an identical rewrite sets bits, a discard does not": (
        "tracking: test_an_identical_rewrite_sets_bits",
        "tracking: test_a_discard_sets_no_bits_though_contents_change",
    ),
    "A zero bits in what was grown": (
        "tracking: test_a_grown_area_has_zero_bits_until_it_is_written",
        "tracking: test_older_logs_are_extended_when_a_disk_grows_between",
    ),
    "A sizes that are no multiple of 2 MiB": (
        "scenario: test_sizes_that_are_no_multiple_of_2_mib",
        "tracking: test_last_partial_block_has_a_bit",
        "nbd: test_nbdcopy_reads_an_odd_size",
    ),
    "A breakers: disable and enable, revert, copies, crash, migration": (
        "tracking: test_disable_and_enable_break_the_chain_though_both_ends_say_enabled",
        "tracking: test_revert_gives_a_new_disk_repoints_snapshots_and_breaks_the_chain",
        "tracking: test_a_copy_is_not_tracked_and_leaves_the_source_alone",
        "tracking: test_a_crash_switches_tracking_off_at_the_next_start",
        "tracking: test_storage_migration_is_refused",
    ),
    "A keepers: destroy between, data_destroy, resize, scan, restart": (
        "tracking: test_destroying_an_intermediate_snapshot_keeps_its_bits",
        "tracking: test_data_destroy_of_both_ends_changes_nothing",
        "tracking: test_older_logs_are_extended_when_a_disk_grows_between",
        "tracking: test_scan_breaks_nothing_but_the_size_of_metadata",
        "tracking: test_a_shutdown_or_reboot_keeps_the_chain",
        "tracking: test_migration_within_an_sr_keeps_the_chain",
    ),
    "A both ends say cbt_enabled and are unrelated": (
        "tracking: test_disable_and_enable_break_the_chain_though_both_ends_say_enabled",
    ),
    # ── A: NBD ──────────────────────────────────────────────────────────────────────────────
    "A options: unsupported GO and structured replies": (
        "nbd: test_greets_as_fixed_newstyle_and_nothing_more",
        "nbd: test_options_before_tls",
        "nbd: test_options_after_tls",
        "nbd: test_options_without_tls",
        "nbd: test_closes_without_a_word_before_tls",
        "nbd: test_client_without_fixed_newstyle_is_closed",
    ),
    "A an export is size, flags and 124 zeroes": ("nbd: test_export_is_size_flags_and_124_zeroes",),
    "A EINVAL, then close; other commands and flags refused": (
        "nbd: test_unaligned_read_is_einval_and_the_end",
        "nbd: test_other_commands_are_refused_and_the_end",
        "nbd: test_a_wrong_magic_number_is_the_end",
        "nbd: test_read_of_two_gib_is_closed",
    ),
    "A a header without error, then less data than promised": (
        "nbd: test_read_past_the_end_says_success_and_breaks_off",
        "nbd: test_read_error_in_the_middle_says_success_first",
    ),
    "A silent close for any export that does not work": (
        "nbd: test_wrong_export_is_closed_silently",
        "nbd: test_a_host_without_the_sr_closes",
        "vdi: test_a_bad_export_name_opens_nothing",
    ),
    "A one request after the other": ("nbd: test_requests_are_answered_in_order",),
    "A alignment to 512 and to 4096 bytes": (
        "nbd: test_unaligned_read_is_einval_and_the_end",
        "nbd: test_sectors_of_4096_bytes",
    ),
    # ── A: TLS ──────────────────────────────────────────────────────────────────────────────
    "A TLS forced or absent by the networks' purpose": (
        "nbd: test_options_before_tls",
        "nbd: test_serves_plainly_when_the_purpose_is_insecure",
        "nbd: test_closes_without_greeting_when_no_network_has_a_purpose",
    ),
    "A a certificate per host, without the NBD address": (
        "nbd: test_the_certificate_lacks_the_nbd_address",
        "nbd: test_hosts_have_different_certificates",
    ),
    "A TLS 1.2 and secp384r1": (
        "nbd: test_tls_is_1_2_with_the_two_suites",
        "http: test_openssl_sees_the_curve_and_the_certificate",
        "http: test_tls_1_3_is_not_spoken",
    ),
    "A impostors and an attacker who strips STARTTLS": (
        "nbd: test_an_impostor_shows_another_certificate",
        "nbd: test_stripping_starttls_catches_who_goes_on_without",
        "nbd: test_no_tls_though_the_purpose_is_nbd",
        "http: test_an_impostor_has_another_certificate",
    ),
    # ── A: encodings ────────────────────────────────────────────────────────────────────────
    "A ints are strings in XML and numbers in JSON": (
        "api: test_xml_carries_ints_as_strings_and_json_as_numbers",
        "api: test_the_raw_xml_of_an_int_is_untyped_and_of_a_float_a_double",
    ),
    "A failures in the shapes of both encodings": (
        "api: test_xml_failure_has_the_code_first",
        "api: test_json_2_failure_has_the_code_apart",
        "api: test_json_1_answers_in_its_own_shape",
    ),
    "A task.result is a string of XML": (
        "api: test_async_returns_a_task_whose_result_is_xml_over_json_too",
    ),
    # ── B ───────────────────────────────────────────────────────────────────────────────────
    "B dom0's VBD from before the size until after the clean-up": (
        "vdi: test_an_export_has_a_vbd_of_that_hosts_dom0_while_it_is_open",
        "nbd: test_end_of_file_after_disc_means_the_vbd_is_gone",
        "vdi: test_a_vbd_stays_for_the_delay_and_list_changed_blocks_waits",
        "vdi: test_a_leaked_vbd_stays_until_somebody_unplugs_it",
    ),
    "B VDI_IN_USE for list_changed_blocks, destroy, resize": (
        "tracking: test_an_export_blocks_the_newer_end_only",
        "tracking: test_the_live_disk_of_a_running_vm_is_in_use",
        "vdi: test_what_is_attached_cannot_be_destroyed_resized_or_copied",
    ),
    "B VM.snapshot's VM, disks and VBDs; VM.destroy leaves disks": (
        "vm: test_a_vm_snapshot_is_a_halted_template_with_vbds_of_its_own",
        "vm: test_disks_are_snapshotted_and_a_cd_is_shared",
        "vm: test_destroying_a_vm_leaves_its_vdis",
        "vm: test_a_failing_disk_takes_the_snapshots_made_before_with_it",
        "vm: test_there_is_no_one_instant_for_all_disks",
    ),
    "B data_destroy: refusals, wait, type flip and rollback, repetition": (
        "vdi: test_data_destroy_is_refused_for_what_is_no_tracked_snapshot",
        "vdi: test_data_destroy_is_refused_while_the_vm_snapshot_has_its_vbd",
        "vdi: test_data_destroy_shows_the_new_type_while_it_waits_and_takes_it_back",
        "vdi: test_a_failing_data_destroy_takes_the_type_back",
        "vdi: test_metadata_can_do_little",
    ),
    "B VDI.snapshot's fields; base copies": (
        "vdi: test_a_snapshot_copies_what_it_copies",
        "vdi: test_a_hidden_base_copy_appears_below_both",
    ),
    "B an export name lives as long as its session": (
        "nbd: test_export_name_of_an_ended_session_is_dead",
        "nbd: test_logout_does_not_cut_an_open_export",
        "vdi: test_an_export_outlives_its_session_but_its_name_does_not",
    ),
    "B sessions: end, and another ref after the next login": (
        "api: test_a_session_ends_by_logout_expiry_and_disuse",
        "api: test_logging_in_again_gives_another_ref",
    ),
    "B sixteen slots per host, silent close, free after the clean-up": (
        "nbd: test_the_seventeenth_connection_is_closed_without_a_byte",
        "nbd: test_the_slot_is_free_after_the_end_only",
    ),
    "B two hosts, HOST_IS_SLAVE": (
        "api: test_a_supporter_names_the_master",
        "http: test_supporter_sends_to_the_master",
    ),
    "B shared and local SRs, a detached PBD": (
        "scenario: test_one_of_everything",
        "vdi: test_a_host_that_does_not_see_the_sr_opens_nothing",
        "vdi: test_an_sr_without_attached_pbd_does_nothing",
    ),
    "B several addresses, IPv6 with a prefix, an empty list, insecure_nbd with a certificate": (
        "nbd: test_get_nbd_info_lists_each_address_of_each_host",
        "nbd: test_closes_without_greeting_when_no_network_has_a_purpose",
        "nbd: test_serves_plainly_when_the_purpose_is_insecure",
        "vdi: test_purposes_do_not_mix",
    ),
    "B SRs that don't track, raw VDIs, base copies, CDs, the tools ISO": (
        "vdi: test_which_types_of_sr_track_changes_is_told_by_sm",
        "vdi: test_a_raw_image_cannot_be_tracked",
        "scenario: test_one_of_everything",
    ),
    # ── C ───────────────────────────────────────────────────────────────────────────────────
    "C latency; blocking on an SR's lock; Async": (
        "api: test_a_call_can_be_delayed",
        "vdi: test_a_second_operation_on_an_sr_waits",
        "vdi: test_an_sr_can_be_locked_by_somebody_else",
        "api: test_async_returns_a_task_whose_result_is_xml_over_json_too",
    ),
    "C event.from: void tokens, deletions, a session that ends while it waits": (
        "events: test_a_token_of_before_a_failover_is_void",
        "events: test_new_and_gone_objects",
        "events: test_a_session_that_ends_ends_the_wait",
    ),
    "C state survives a restart, and a power cut": (
        "state: test_a_stopped_pool_comes_back_as_it_was",
        "state: test_a_killed_pool_comes_back_as_after_a_power_cut",
        "life: test_records_survive_a_restart_and_sessions_do_not",
        "life: test_disks_survive_a_restart",
        "life: test_the_certificates_survive_a_restart",
    ),
    "C handlers: 200 first, the outcome on the task, no length, truncation": (
        "http: test_raw_export_is_the_disk_without_a_length",
        "http: test_a_failed_attach_is_html_inside_the_200",
        "http: test_a_truncated_export_shows_on_the_task_only",
        "http: test_vhd_export_holds_the_same_bytes",
        "http: test_the_disk_is_in_use_until_after_the_answer",
    ),
    "C handlers: 302, 401, 403, 431, Transfer-Encoding": (
        "http: test_a_host_without_the_sr_redirects",
        "http: test_without_session_401_and_the_task_fails",
        "http: test_rbac_refusal_is_403",
        "http: test_a_long_head_is_431",
        "http: test_transfer_encoding_is_refused",
    ),
    "C chunks and their end; the vdi: map": (
        "http: test_chunked_import_writes_any_order_and_nothing_else",
        "http: test_a_chunk_beyond_the_end_fails_on_the_task",
        "http: test_a_missing_terminator_fails_on_the_task",
        "http: test_import_makes_a_new_vm_on_the_mapped_disk",
    ),
    "C failover: sessions lost, another certificate, cut connections, a booting host": (
        "failover: test_failover_moves_the_master_and_ends_sessions",
        "failover: test_after_failover_another_certificate_appears",
        "failover: test_failover_cuts_https_connections",
        "failover: test_failover_leaves_open_exports_alone",
        "api: test_failover_loses_sessions_and_tasks",
        "api: test_a_booting_host_says_so",
    ),
    "C a host that dies while it is read; silence before the greeting": (
        "failover: test_a_host_that_dies_cuts_a_read",
        "nbd: test_silence_before_the_greeting_ends_with_the_fault",
    ),
    "C metadata's size after a scan, licence, delay of a failed login, 109 and 44": (
        "tracking: test_scan_breaks_nothing_but_the_size_of_metadata",
        "vdi: test_the_licence_restricts_enabling_only",
        "api: test_a_wrong_password_is_refused_after_a_delay",
        "vdi: test_a_chain_of_30_takes_no_more_snapshots",
        "vdi: test_a_full_sr_takes_no_snapshots",
        "tracking: test_a_failed_log_leaves_the_snapshot_and_switches_tracking_off",
    ),
    "C shared disks, disks without VM, twins and names that are a trap": (
        "scenario: test_one_of_everything",
        "scenario: test_names_that_are_a_trap_and_twins",
        "api: test_hostile_names_survive_both_encodings",
    ),
}


def names_in(name: str) -> Iterator[str]:
    tree = ast.parse((HERE / f"test_simulator_{name}.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name


@pytest.mark.parametrize("line", CHECKLIST)
def test_every_line_names_tests_that_exist(line: str) -> None:
    assert CHECKLIST[line]
    for entry in CHECKLIST[line]:
        file, _, test = entry.partition(": ")
        assert test in set(names_in(file)), entry
