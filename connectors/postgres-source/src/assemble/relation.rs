//! A Relation message as it is kept until the catalog has completed it.

use wallaby_model::{ReplicaIdentity, TableName};

use crate::pgoutput::Relation;

/// What the stream says of a table's shape.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RelationShape {
    pub(crate) oid: u32,
    pub(crate) table: TableName,
    pub(crate) identity: ReplicaIdentity,
    pub(crate) columns: Vec<ShapeColumn>,
}

/// A column of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ShapeColumn {
    pub(crate) name: String,
    pub(crate) identity: bool,
    pub(crate) type_oid: u32,
    pub(crate) type_modifier: i32,
}

impl RelationShape {
    pub(crate) fn of(relation: &Relation<'_>) -> RelationShape {
        // pgoutput leaves pg_catalog empty.
        let schema = if relation.schema.is_empty() { "pg_catalog" } else { relation.schema };
        let columns = relation.columns.iter().map(|column| ShapeColumn {
            name: column.name.to_owned(),
            identity: column.identity,
            type_oid: column.type_oid,
            type_modifier: column.type_modifier,
        });
        RelationShape {
            oid: relation.oid,
            table: TableName::new(schema, relation.name),
            identity: relation.identity,
            columns: columns.collect(),
        }
    }
}
