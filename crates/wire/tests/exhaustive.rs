//! Arithmetic of rings, regions and features for every value there is, or every one of a small ring. They stand in for a model checker.

use warmswap_wire::inflight::{RegionError, read_split, ring_bytes};
use warmswap_wire::ring::{Layout, SIZE_MAX, crosses_event};
use warmswap_wire::{DeviceType, ProtocolFeatures, VirtioFeatures};

#[test]
fn every_index_of_every_ring_has_its_slot_and_every_slot_its_place() {
    let sizes: Vec<u16> = (0..=u16::MAX).filter(|size| Layout::new(*size).is_some()).collect();
    assert_eq!(sizes, (0..16).map(|power| 1 << power).collect::<Vec<u16>>());
    for layout in sizes.iter().filter_map(|size| Layout::new(*size)) {
        let size = layout.size();
        for index in 0..=u16::MAX {
            let (slot, next) = (layout.slot(index), layout.slot(index.wrapping_add(1)));
            assert!(slot < size && u32::from(next) == (u32::from(slot) + 1) % u32::from(size), "{size} {index}");
        }
        // Each slot right behind the one before it, the event index behind the last, nothing beyond the end.
        for slot in 0..size {
            assert_eq!(layout.available_slot(slot), 4 + 2 * u64::from(slot));
            assert_eq!(layout.used_slot(slot), 4 + 8 * u64::from(slot));
        }
        assert_eq!(layout.used_event(), layout.available_slot(size - 1) + 2);
        assert_eq!(layout.used_event() + 2, layout.available_bytes());
        assert_eq!(layout.avail_event(), layout.used_slot(size - 1) + 8);
        assert_eq!(layout.avail_event() + 2, layout.used_bytes());
        assert!(size <= SIZE_MAX && layout.descriptor_bytes() == 16 * u64::from(size));
    }
}

#[test]
fn an_event_is_crossed_if_it_lies_between_the_old_index_and_the_new_whatever_these_are() {
    // Every old index, steps and distances on both sides of every border.
    let steps = [0_u16, 1, 2, 3, 255, 256, 32_767, 32_768, 65_534, 65_535];
    for old in 0..=u16::MAX {
        for step in steps {
            let new = old.wrapping_add(step);
            for off in [0_u16, 1, 2, step.wrapping_sub(2), step.wrapping_sub(1), step, step.wrapping_add(1), u16::MAX] {
                let event = old.wrapping_add(off);
                assert_eq!(crosses_event(event, new, old), off < step, "event {event}, {old} to {new}");
            }
        }
    }
}

/// One ring's part of a region: who is marked, where lists lead, where the last batch begins. Counters fall with the head.
fn region(size: u16, marks: u32, next: &[u16], first: u16) -> Vec<u8> {
    let mut bytes = vec![0; ring_bytes(size) as usize];
    bytes[8..16].copy_from_slice(&[1, size, first, 0].map(u16::to_ne_bytes).concat());
    for head in 0..usize::from(size) {
        let entry = &mut bytes[16 + 16 * head..][..16];
        entry[0] = (marks >> head & 1) as u8;
        entry[6..8].copy_from_slice(&next[head].to_ne_bytes());
        entry[8..].copy_from_slice(&(100 - head as u64).to_ne_bytes());
    }
    bytes
}

/// The batch by its definition: `count` heads along the list, if it neither leaves the ring nor comes back to one.
fn batch(size: u16, next: &[u16], first: u16, count: u16) -> Result<Vec<u16>, u16> {
    let (mut heads, mut at) = (Vec::new(), first);
    while heads.len() < usize::from(count) {
        if at >= size || heads.contains(&at) {
            return Err(at);
        }
        heads.push(at);
        at = next[usize::from(at)];
    }
    Ok(heads)
}

#[test]
fn every_region_of_a_ring_of_four_names_what_is_owed_or_is_refused_at_the_entry_that_is_wrong() {
    let (mut read, mut refused) = (0, 0);
    for size in [1_u16, 2, 4] {
        let leads = usize::from(size) + 1;
        for lists in 0..leads.pow(size.into()) {
            let next: Vec<u16> = (0..u32::from(size)).map(|head| (lists / leads.pow(head) % leads) as u16).collect();
            for (first, marks) in (0..=size).flat_map(|first| (0..1_u32 << size).map(move |marks| (first, marks))) {
                let bytes = region(size, marks, &next, first);
                for count in 0..=size + 1 {
                    match (read_split(&bytes, size, count), batch(size, &next, first, count)) {
                        (Ok(ring), Ok(batch)) => {
                            let owed: Vec<u16> =
                                (0..size).rev().filter(|it| marks >> it & 1 == 1 && !batch.contains(it)).collect();
                            assert_eq!((ring.heads, ring.repaired), (owed, batch));
                            read += 1;
                        }
                        (Err(RegionError::Batch { at }), Err(wrong)) => {
                            assert_eq!(at, wrong);
                            refused += 1;
                        }
                        (found, expected) => panic!("{found:?}, expected {expected:?}: {next:?} from {first}"),
                    }
                }
            }
        }
    }
    assert!(read > 50_000 && refused > 50_000, "both happen: {read} read, {refused} refused");
}

#[test]
fn every_used_index_but_those_within_a_ring_of_the_regions_is_refused() {
    let next = [1, 2, 3, 4, 5, 6, 7, 0];
    let bytes = region(8, 0xff, &next, 3);
    for used_idx in 0..=u16::MAX {
        assert_eq!(read_split(&bytes, 8, used_idx).is_ok(), used_idx <= 8, "used.idx {used_idx}");
    }
}

/// Bits of each device type that the specification of virtio 1.3 gives it and that may pass, beside the transport's.
const OF_THE_DEVICE: [(DeviceType, &[u32]); 7] = [
    (DeviceType::Blk, &[1, 2, 4, 5, 6, 9, 10, 11, 12, 13, 14, 15]),
    (DeviceType::Scsi, &[0, 1, 2, 3]),
    (DeviceType::Net, &[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23]),
    (DeviceType::Fs, &[0]),
    (DeviceType::Rng, &[]),
    (DeviceType::Console, &[0, 1, 2]),
    (DeviceType::Input, &[]),
];
/// Those of the transport: not 33 (IOMMU), 34 (packed), 35 (in order), 37 (SR-IOV), 38 (notification data), 40 (ring reset).
const OF_THE_TRANSPORT: [u32; 8] = [24, 26, 27, 28, 29, 30, 32, 36];

#[test]
fn every_single_feature_bit_passes_only_where_it_is_listed() {
    assert_eq!(OF_THE_DEVICE.map(|(device, _)| device).as_slice(), DeviceType::ALL);
    for (device, own) in OF_THE_DEVICE {
        for bit in 0..u64::BITS {
            let passes = device.virtio_features() >> bit & 1 == 1;
            let listed = own.contains(&bit) || OF_THE_TRANSPORT.contains(&bit);
            assert_eq!(passes, listed, "bit {bit} of {}", device.name());
        }
        let masked = VirtioFeatures::ACCESS_PLATFORM | VirtioFeatures::RING_PACKED | VirtioFeatures::IN_ORDER;
        assert_eq!(device.virtio_features() & masked.bits(), 0);
    }
}

#[test]
fn every_single_protocol_feature_bit_passes_only_where_it_is_listed() {
    // MQ, the log, acknowledgements and memory by slots are everybody's.
    let own = |device: DeviceType| -> &[u32] {
        match device {
            DeviceType::Blk => &[5, 9],
            DeviceType::Scsi => &[5],
            DeviceType::Net => &[2, 4, 5],
            DeviceType::Fs => &[],
            DeviceType::Rng | DeviceType::Console | DeviceType::Input => &[9],
        }
    };
    for device in DeviceType::ALL {
        for bit in 0..u64::BITS {
            let passes = device.protocol_features().bits() >> bit & 1 == 1;
            assert_eq!(passes, [0, 1, 3, 15].contains(&bit) || own(*device).contains(&bit), "bit {bit} of {device:?}");
            for region in [false, true] {
                let used = device.link_features(region).bits() >> bit & 1 == 1;
                let tracks = bit == 12 && region && *device != DeviceType::Fs;
                let moves = bit == 19 && *device == DeviceType::Fs;
                assert_eq!(used, passes || tracks || moves, "bit {bit} of a link to {device:?}");
            }
        }
        assert!(ProtocolFeatures::all().contains(device.link_features(true)));
    }
}
