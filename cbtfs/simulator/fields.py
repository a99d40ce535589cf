"""The fields of xapi's records: class, type, name; ``*`` marks those with a setter.

From the datamodel of xen-api (ocaml/idl). A set or map with a setter has ``add_to_FIELD`` and
``remove_from_FIELD``, or ``add_FIELD`` and ``remove_FIELD``, as well.
"""

from dataclasses import dataclass

from .values import EPOCH, NULL, Record, Value

_TABLE = {
    "VDI": """
        string: uuid name_label* name_description* type location on_boot
        set: allowed_operations VBDs crash_dumps snapshots tags*
        map: current_operations other_config* xenstore_data* sm_config*
        ref: SR parent snapshot_of metadata_of_pool
        int: virtual_size physical_utilisation
        bool: sharable* read_only* storage_lock managed missing is_a_snapshot allow_caching
            metadata_latest is_tools_iso cbt_enabled
        datetime: snapshot_time
    """,
    "VBD": """
        string: uuid device userdevice* mode type* status_detail qos_algorithm_type*
        set: allowed_operations qos_supported_algorithms
        map: current_operations other_config* runtime_properties qos_algorithm_params*
        ref: VM VDI metrics
        bool: bootable* unpluggable* storage_lock empty currently_attached
        int: status_code
    """,
    "VM": """
        string: uuid name_label* name_description* power_state actions_after_softreboot*
            actions_after_shutdown* actions_after_reboot* actions_after_crash PV_bootloader*
            PV_kernel* PV_ramdisk* PV_args* PV_bootloader_args* PV_legacy_args*
            HVM_boot_policy PCI_bus* domarch last_booted_record recommendations*
            ha_restart_priority transportable_snapshot_id snapshot_metadata generation_id
            reference_label domain_type
        set: allowed_operations consoles VIFs VBDs VUSBs crash_dumps VTPMs snapshots tags*
            children VGPUs attached_PCIs pending_guidances pending_guidances_recommended
            pending_guidances_full
        map: current_operations VCPUs_params* HVM_boot_params* platform* other_config*
            last_boot_CPU_flags xenstore_data* blobs blocked_operations* snapshot_info
            bios_strings NVRAM
        int: user_version* memory_overhead memory_target memory_static_max
            memory_dynamic_max memory_dynamic_min memory_static_min VCPUs_max
            VCPUs_at_startup domid start_delay shutdown_delay order version
            hardware_platform_version*
        bool: is_a_template* is_default_template is_control_domain ha_always_run
            is_a_snapshot is_snapshot_from_vmpp is_vmss_snapshot has_vendor_device
            requires_reboot
        ref: suspend_VDI resident_on scheduled_to_be_resident_on affinity* metrics
            guest_metrics snapshot_of parent protection_policy snapshot_schedule appliance
            suspend_SR*
        float: HVM_shadow_multiplier
        datetime: snapshot_time
    """,
    "SR": """
        string: uuid name_label* name_description* type content_type
        set: allowed_operations VDIs PBDs tags*
        map: current_operations other_config* sm_config* blobs
        int: virtual_allocation physical_utilisation physical_size
        bool: shared local_cache_enabled clustered is_tools_sr
        ref: introduced_by
    """,
    "PBD": """
        string: uuid
        ref: host SR
        map: device_config other_config*
        bool: currently_attached
    """,
    "network": """
        string: uuid name_label* name_description* bridge default_locking_mode
        set: allowed_operations VIFs PIFs tags* purpose
        map: current_operations other_config* blobs assigned_ips
        int: MTU*
        bool: managed
    """,
    "PIF": """
        string: uuid device MAC ip_configuration_mode IP netmask gateway DNS
            ipv6_configuration_mode ipv6_gateway primary_address_type igmp_snooping_status
        ref: network host metrics bond_slave_of VLAN_master_of PCI
        int: MTU VLAN
        bool: physical currently_attached management disallow_unplug managed
        set: bond_master_of VLAN_slave_of tunnel_access_PIF_of tunnel_transport_PIF_of IPv6
            capabilities sriov_physical_PIF_of sriov_logical_PIF_of
        map: other_config* properties
    """,
    "host": """
        string: uuid name_label* name_description* API_version_vendor sched_policy hostname*
            address* external_auth_type external_auth_service_name edition power_on_mode
            display* iscsi_iqn uefi_certificates latest_synced_updates_applied
            numa_affinity_policy last_update_hash
        int: memory_overhead API_version_major API_version_minor
        set: allowed_operations capabilities supported_bootloaders resident_VMs PIFs
            crashdumps patches updates PBDs host_CPUs ha_statefiles ha_network_peers tags*
            PCIs PGPUs PUSBs virtual_hardware_platform_versions updates_requiring_reboot
            features certificates editions pending_guidances pending_guidances_recommended
            pending_guidances_full
        map: current_operations API_version_vendor_implementation software_version
            other_config* cpu_configuration logging* cpu_info license_params blobs
            external_auth_configuration license_server* bios_strings power_on_config
            chipset_info guest_VCPUs_params*
        bool: enabled ssl_legacy multipathing tls_verification_enabled https_only
        ref: suspend_image_sr* crash_dump_sr* metrics local_cache_sr control_domain
        datetime: last_software_update
    """,
    "pool": """
        string: uuid name_label* name_description* wlb_url wlb_username vswitch_controller
            ha_cluster_stack uefi_certificates custom_uefi_certificates
            client_certificate_auth_name repository_proxy_url repository_proxy_username
            telemetry_frequency update_sync_frequency
        ref: master default_SR* suspend_image_SR* crash_dump_SR* redo_log_vdi
            repository_proxy_password telemetry_uuid
        map: other_config* ha_configuration blobs gui_config* health_check_config*
            restrictions current_operations guest_agent_config cpu_info
        bool: ha_enabled ha_allow_overcommit* ha_overcommitted wlb_enabled* wlb_verify_cert*
            redo_log_enabled policy_no_vendor_device* live_patching_disabled*
            igmp_snooping_enabled is_psr_pending* tls_verification_enabled
            client_certificate_auth_enabled migration_compression* coordinator_bias*
            update_sync_enabled
        set: ha_statefiles tags* metadata_VDIs allowed_operations repositories
        int: ha_host_failures_to_tolerate ha_plan_exists_for local_auth_max_threads
            ext_auth_max_threads update_sync_day
        datetime: telemetry_next_collection last_update_sync
    """,
    "SM": """
        string: uuid name_label name_description type vendor copyright version
            required_api_version driver_filename
        map: configuration features other_config*
        set: capabilities required_cluster_stack
    """,
    "task": """
        string: uuid name_label name_description status type result backtrace
        set: allowed_operations error_info subtasks
        map: current_operations other_config*
        datetime: created finished
        ref: resident_on subtask_of
        float: progress
    """,
    "session": """
        string: uuid auth_user_sid auth_user_name originator
        ref: this_host this_user subject parent
        datetime: last_active validation_time
        bool: pool is_local_superuser client_certificate
        map: other_config*
        set: rbac_permissions tasks
    """,
    "VIF": """
        string: uuid device MAC locking_mode* qos_algorithm_type* status_detail
            ipv4_configuration_mode ipv4_gateway ipv6_configuration_mode ipv6_gateway
        set: allowed_operations qos_supported_algorithms ipv4_allowed ipv6_allowed
            ipv4_addresses ipv6_addresses
        map: current_operations other_config* runtime_properties qos_algorithm_params*
        ref: network VM metrics
        int: MTU status_code
        bool: currently_attached MAC_autogenerated reserved
    """,
    "message": """
        string: uuid name cls obj_uuid body
        int: priority
        datetime: timestamp
    """,
}


@dataclass(frozen=True)
class Field:
    """One field of a class; ``type`` is string, int, bool, float, datetime, ref, set or map."""

    name: str
    type: str
    writable: bool


def _parse(table: str) -> dict[str, Field]:
    found: dict[str, Field] = {}
    kind = ""
    for word in table.split():
        if word.endswith(":"):
            kind = word[:-1]
            continue
        name = word.rstrip("*")
        found[name] = Field(name, kind, word.endswith("*"))
    return found


CLASSES: dict[str, dict[str, Field]] = {name: _parse(table) for name, table in _TABLE.items()}
"""Name of a class → name of a field → the field."""


def empty_record(kind: str) -> Record:
    """Return a record of class ``kind`` with every field at its default."""
    return {name: _default(field.type) for name, field in CLASSES[kind].items()}


def _default(kind: str) -> Value:
    match kind:
        case "set":
            return []
        case "map":
            return {}
        case _:
            return _SCALARS[kind]


_SCALARS: dict[str, Value] = {
    "string": "",
    "int": 0,
    "bool": False,
    "float": 0.0,
    "ref": NULL,
    "datetime": EPOCH,
}
