//! Changing one value of a scenario's text.

use toml::{Table, Value};

/// The text with another value for a key such as `image.piece_kib` or `nodes.0.count`: a number or boolean where it
/// reads as one, otherwise a string. A key that is not there is added to the table that it names; whether a scenario has such a
/// key is checked when it is parsed.
///
/// # Errors
/// The text is no TOML, or the key leads nowhere.
pub fn vary(text: &str, key: &str, value: &str) -> Result<String, String> {
    let mut root: Table = text.parse().map_err(|error: toml::de::Error| error.message().to_owned())?;
    let mut steps: Vec<&str> = key.split('.').collect();
    let last = steps.pop().unwrap_or_default();
    let mut table = &mut root;
    let mut steps = steps.into_iter();
    while let Some(step) = steps.next() {
        let next = table.entry(step).or_insert_with(|| Value::Table(Table::new()));
        table = match next {
            Value::Table(inner) => inner,
            Value::Array(items) => {
                let index: usize =
                    steps.next().and_then(|index| index.parse().ok()).ok_or("no number after a list")?;
                let count = items.len();
                let item = items.get_mut(index).ok_or_else(|| format!("{step} has {count} entries"))?;
                item.as_table_mut().ok_or_else(|| format!("{step}.{index} has no keys"))?
            }
            _ => return Err(format!("{step} has no keys")),
        };
    }
    let parsed = format!("v = {value}").parse::<Table>().ok().and_then(|mut table| table.remove("v"));
    table.insert(last.to_owned(), parsed.unwrap_or_else(|| Value::String(value.to_owned())));
    toml::to_string(&root).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Policy, Scenario};

    #[test]
    fn values_are_changed_where_the_key_says() {
        let text = include_str!("../scenarios/flash-crowd.toml");
        let with = |key, value| Scenario::parse(&vary(text, key, value).unwrap());
        assert_eq!(with("nodes.1.count", "7").unwrap().nodes[1].count, 7);
        assert_eq!(with("policy", "registry").unwrap().policy, Policy::Registry);
        assert_eq!(with("costs.have_ms", "50").unwrap().costs.have_ms, 50.0);
        assert!(with("image.piece", "1").unwrap_err().to_string().contains("piece"));
        for key in ["nodes.9.count", "nodes.count", "seed.more", "nodes.0.zone.x"] {
            assert!(vary(text, key, "1").is_err(), "{key}");
        }
    }
}
